"""Products with quantised weights: bitsandbytes' own numbers, and no input or gathered weight between the passes."""

from __future__ import annotations

import weakref

import bitsandbytes
import pytest
import torch
from bitsandbytes.autograd._functions import MatMul4Bit, MatMul8bitFp
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn

from packhorse.model.quantized_products import replace_products

# Of bitsandbytes, about kernels that are not installed.
pytestmark = pytest.mark.filterwarnings("ignore")

INPUTS, OUTPUTS = 128, 192
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives bitsandbytes its functions back afterwards."""
    for name in ("matmul", "matmul_4bit"):
        monkeypatch.setattr(bitsandbytes, name, getattr(bitsandbytes.autograd._functions, name))


def layer(kind: str, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    values, bias = torch.randn(OUTPUTS, INPUTS, dtype=dtype), torch.randn(OUTPUTS, dtype=dtype)
    if kind == "int8":
        made: nn.Linear = Linear8bitLt(INPUTS, OUTPUTS, has_fp16_weights=False)
        made.weight = Int8Params(values, requires_grad=False).to("cpu")
    else:
        made = Linear4bit(INPUTS, OUTPUTS, compute_dtype=dtype, quant_type=kind, quant_storage=dtype)
        made.weight = Params4bit(values, quant_type=kind, quant_storage=dtype, module=made).to("cpu")
        made.support_avx512bf16_for_cpu = False
    made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def passed(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, str]:
    """Output, gradient of the input, and the autograd function that made them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, INPUTS, dtype=dtype, generator=generator).requires_grad_()
    out = module(x)
    out.backward(torch.randn(out.shape, dtype=dtype, generator=generator))
    assert x.grad is not None
    return out.detach(), x.grad, type(out.grad_fn).__name__


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_numbers_are_those_of_bitsandbytes_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    out, gradient, name = passed(layer(kind, dtype), dtype)
    assert name.removesuffix("Backward") == (MatMul8bitFp if kind == "int8" else MatMul4Bit).__name__
    replace_products()
    again, same, name = passed(layer(kind, dtype), dtype)
    assert name == "_FrozenProductBackward"
    assert torch.equal(again, out)
    assert torch.equal(same, gradient)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_input_is_gone_between_the_passes(kind: str) -> None:
    replace_products()
    x = torch.randn(3, INPUTS, requires_grad=True)
    given = x * 2
    storage = weakref.ref(given.untyped_storage())
    out = layer(kind, torch.float32)(given)
    del given
    assert storage() is None
    out.sum().backward()
    assert x.grad is not None


def test_an_engine_can_free_the_weight_between_the_passes_and_gather_it_again() -> None:
    """As DeepSpeed does: the parameter stays, and gets other data."""
    _, gradient, _ = passed(layer("nf4", torch.float32), torch.float32)
    replace_products()
    module = layer("nf4", torch.float32)
    shard = module.weight.data.clone()

    def free(*_: object) -> None:
        module.weight.data = torch.empty(0)

    module.register_forward_hook(free)
    gathered = weakref.ref(module.weight.untyped_storage())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, INPUTS, generator=generator).requires_grad_()
    out = module(x)
    assert gathered() is None
    module.weight.data = shard.clone()
    out.backward(torch.randn(out.shape, generator=generator))
    assert x.grad is not None
    assert torch.equal(x.grad, gradient)


def test_8_bit_weights_give_the_same_numbers_in_training_and_evaluation_and_each_token_alone() -> None:
    """bitsandbytes' own product rounds the inputs to 8 bits where the layer does not train, and always on a GPU."""
    replace_products()
    module, tokens = layer("int8", torch.float32), torch.randn(5, INPUTS)
    trained = module.train()(tokens)
    assert torch.equal(module.eval()(tokens), trained)
    tokens[0] *= 1000
    torch.testing.assert_close(module(tokens)[1:], trained[1:])


def test_autocast_reaches_the_backward_pass_of_8_bit_weights() -> None:
    replace_products()
    module, x = layer("int8", torch.float32), torch.randn(3, INPUTS, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad is not None
    # In bfloat16 as autocast's linear layer, and not in float32.
    assert torch.equal(x.grad, x.grad.bfloat16().float())
