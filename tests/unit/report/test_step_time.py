"""The reading of a trace against times done by hand, on events as torch's profiler writes them on GPU and CPU."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from packhorse.errors import UserError
from packhorse.report.step_time import kind_of, read_trace, step_time

MS = 1e3  # the trace counts microseconds


def event(category: str, name: str, start: float, milliseconds: float, **more: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "tid": 1, "ts": start * MS, "dur": milliseconds * MS, **more}


def launch(name: str, at: float, number: int) -> dict[str, Any]:
    return event("cuda_runtime", name, at, 0.5, args={"correlation": number})


def kernel(name: str, start: float, milliseconds: float, number: int, category: str = "kernel") -> dict[str, Any]:
    return event(category, name, start, milliseconds, args={"correlation": number}, tid=7)


GPU_STEP = [
    event("user_annotation", "step 7", 0, 100),
    event("user_annotation", "phase data", 0, 10),
    event("user_annotation", "phase forward", 10, 20),
    event("user_annotation", "phase backward", 30, 20),
    event("user_annotation", "phase optimizer", 50, 45),
    launch("cudaLaunchKernel", 11, 1),
    launch("cudaLaunchKernel", 12, 2),
    launch("cudaLaunchKernel", 31, 3),
    launch("cudaMemcpyAsync", 51, 4),
    event("cuda_runtime", "cudaStreamSynchronize", 52, 40, args={"correlation": 5}),
    # The forward pass's kernels still run while the host is in the backward pass; two of them overlap by 5 ms.
    kernel("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", 12, 20, 1),
    kernel("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", 27, 10, 2),
    kernel("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_64x3_tn", 40, 30, 3),
    kernel("Memcpy DtoH (Device -> Pinned)", 75, 1, 4, "gpu_memcpy"),
]


def test_a_step_on_a_gpu() -> None:
    found = step_time(GPU_STEP)
    assert found is not None
    assert found.steps == (7, 7)
    assert found.step_seconds == pytest.approx(0.100)
    # Busy from 12 to 37, from 40 to 70, and 1 ms.
    assert found.idle_share == pytest.approx(1 - 0.56)
    assert {kind.name: round(kind.seconds, 6) for kind in found.kinds} == {
        "products": 0.050,
        "elementwise": 0.010,
        "copies": 0.001,
    }
    assert found.elementwise_per_product == pytest.approx(0.2)
    assert [(each.name[:12], round(each.share, 4)) for each in found.top[:2]] == [
        ("ampere_bf16_", round(30 / 61, 4)),
        ("nvjet_tst_12", round(20 / 61, 4)),
    ]
    phases = {phase.name: phase for phase in found.phases}
    assert list(phases) == ["data", "forward", "backward", "optimizer", "other"]
    assert {name: round(phase.seconds, 6) for name, phase in phases.items()} == {
        "data": 0.010,
        "forward": 0.020,
        "backward": 0.020,
        "optimizer": 0.045,
        "other": 0.005,
    }
    # A kernel belongs to the phase that launched it.
    assert [round(phase.device_seconds or 0, 6) for phase in found.phases] == [0, 0.030, 0.030, 0.001, 0]
    assert [(phase.waits, round(phase.wait_seconds, 6)) for phase in found.phases][3] == (1, 0.040)
    assert sum(phase.waits for phase in found.phases) == 1


def test_figures_are_means_over_the_steps_and_exclude_what_is_outside() -> None:
    second = [{**each, "ts": each["ts"] + 200 * MS} for each in GPU_STEP]
    second = [
        {**each, "args": {"correlation": each["args"]["correlation"] + 10}} if "args" in each else each
        for each in second
    ]
    second[0] = event("user_annotation", "step 8", 200, 200)
    after = [launch("cudaLaunchKernel", 500, 99), kernel("late_gemm", 500, 1000, 99)]
    found = step_time([*second, *GPU_STEP, *after])
    assert found is not None
    assert found.steps == (7, 8)
    assert found.step_seconds == pytest.approx(0.150)
    assert found.top[0].calls == 1
    assert found.top[0].seconds == pytest.approx(0.030)


def test_on_a_cpu_an_operator_counts_without_those_that_it_calls() -> None:
    found = step_time(
        [
            event("user_annotation", "step 1", 0, 50),
            event("user_annotation", "phase forward", 0, 50),
            event("cpu_op", "aten::linear", 1, 30),
            event("cpu_op", "aten::mm", 2, 25),
            event("cpu_op", "aten::mul", 35, 5),
            event("cpu_op", "aten::mm", 35, 5, tid=2),  # another thread is no callee
        ]
    )
    assert found is not None
    assert found.idle_share is None
    assert {each.name: round(each.seconds, 6) for each in found.top} == {
        "aten::mm": 0.030,
        "aten::linear": 0.005,
        "aten::mul": 0.005,
    }


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("products", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1__5x_cublas"),
        ("products", "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x64_32x6_nn_align8>(Params)"),
        ("products", "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>"),
        ("products", "triton_tem_fused_mm_5"),
        ("attention", "fmha_cutlassF_bf16_aligned_64x64_rf_sm80"),
        ("attention", "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128>>"),
        ("communication", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"),
        ("elementwise", "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>"),
        ("elementwise", "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, MeanOps>>"),
        ("elementwise", "triton_poi_fused_mul_silu_0"),
        ("elementwise", "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>"),
        ("elementwise", "_rms_norm_forward_kernel"),
        ("copies", "Memset (Device)"),
        ("other", "aten::view"),
    ],
)
def test_the_kind_of_kernels_that_real_traces_hold(kind: str, name: str) -> None:
    assert kind_of(name) == kind


def test_a_trace_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trace.json.gz"
    file.write_bytes(gzip.compress(b'{"traceEvents": []}' * 50)[:20])
    with pytest.raises(UserError, match="is not a complete trace"):
        read_trace(file)
