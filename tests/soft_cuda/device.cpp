// Soft CUDA: a `cuda` device for the CPU build of torch. Its memory is the host's, its kernels are those of the CPU.
//
// Proves that code which asks for CUDA takes CUDA's branches (dispatch, autocast, fused optimizers, pinned memory,
// NCCL) with tensors on the right device, and computes the right numbers in them. As on a GPU, an operator refuses
// operands on two devices, and each wait of the host for the device is reported (`soft_cuda_report_waits`).
//
// Cannot prove anything about real kernels (rounding, atomics, speed), streams, events, the allocator or the driver.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>

namespace {
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::Storage;

// --- the current device, as in CUDA one per thread -----------------------------------------------------------------

constexpr DeviceIndex kDevices = 8;
thread_local DeviceIndex current = 0;

Device here() { return Device(DeviceType::CUDA, current); }

DeviceIndex exchange(DeviceIndex device) { return device < 0 ? current : std::exchange(current, device); }

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  Device getDevice() const override { return here(); }
  Device exchangeDevice(Device device) const override { return Device(DeviceType::CUDA, exchange(device.index())); }
  void setDevice(Device device) const override { exchange(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { exchange(device.index()); }
  c10::Stream getStream(Device device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(Device device, int) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

// --- memory ---------------------------------------------------------------------------------------------------------

void release(void* data) { c10::GetCPUAllocator()->raw_deallocate(data); }

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::GetCPUAllocator()->raw_allocate(bytes) : nullptr;
    return {data, data, bytes ? &release : &c10::detail::deleteNothing, here()};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} device_memory;

// Pinned memory is known by its addresses, so that a copy from pageable memory is told from one that need not wait.
std::mutex pinned_lock;
std::map<uintptr_t, size_t>& pinned_blocks() { static std::map<uintptr_t, size_t> blocks; return blocks; }

void unpin(void* data) {
  { std::lock_guard<std::mutex> hold(pinned_lock); pinned_blocks().erase(reinterpret_cast<uintptr_t>(data)); }
  release(data);
}

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> hold(pinned_lock);
  const auto address = reinterpret_cast<uintptr_t>(data);
  auto block = pinned_blocks().upper_bound(address);
  return block != pinned_blocks().begin() && address < (--block)->first + block->second;
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, Device(DeviceType::CPU)};
    void* data = c10::GetCPUAllocator()->raw_allocate(bytes);
    std::lock_guard<std::mutex> hold(pinned_lock);
    pinned_blocks()[reinterpret_cast<uintptr_t>(data)] = bytes;
    return {data, data, &unpin, Device(DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} pinned_memory;

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(here()));
  return at::detail::empty_generic(size, &device_memory, DispatchKeySet(DispatchKey::CUDA),
                                   type.value_or(at::get_default_dtype_as_scalartype()), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> type,
                         std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(here()));
  return at::detail::empty_strided_generic(size, stride, &device_memory, DispatchKeySet(DispatchKey::CUDA),
                                           type.value_or(at::get_default_dtype_as_scalartype()));
}

void resize_storage(const at::Tensor& tensor, int64_t bytes) {
  Storage storage = tensor.storage();
  c10::DeviceGuard guard(tensor.device());
  auto fresh = device_memory.allocate(bytes);
  if (const size_t kept = std::min<size_t>(bytes, storage.nbytes())) memcpy(fresh.mutable_get(), storage.data(), kept);
  storage.set_data_ptr_noswap(std::move(fresh));
  storage.set_nbytes(bytes);
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  const size_t bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.dtype().itemsize();
  if (bytes > self.storage().nbytes()) resize_storage(self, bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

at::Tensor& set_storage_offset(at::Tensor& self, Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (stride.size() == size.size()) {
    impl->set_sizes_and_strides(size, stride, offset);
  } else {
    impl->set_sizes_contiguous(size);
    impl->set_storage_offset(offset);
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, Storage storage) {
  const int64_t count = storage.nbytes() / self.dtype().itemsize();
  return set_storage_offset(self, std::move(storage), 0, {count}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& other) {
  return set_storage_offset(self, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  return set_storage(self, Storage(Storage::use_byte_size_t(), 0, device_memory.allocate(0), &device_memory, true));
}

// --- the same memory as a tensor of the host and as one of the device ------------------------------------------------

void drop(void* storage) { delete static_cast<Storage*>(storage); }

c10::DataPtr shared(const Storage& storage, Device device) {
  return {const_cast<void*>(storage.data()), new Storage(storage), &drop, device};
}

at::Tensor with_storage(const at::Tensor& like, Storage storage, DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

// Views of the operands of one call; tensors that share a storage also share it on the other side.
class Views {
 public:
  explicit Views(Device device) : device_(device) {}

  at::Tensor host(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    for (const auto& [device, host] : pairs_)
      if (device.unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl()) return with_storage(tensor, host, DispatchKey::CPU);
    Storage twin(Storage::use_byte_size_t(), tensor.storage().nbytes(), shared(tensor.storage(), at::kCPU), c10::GetCPUAllocator(), true);
    pairs_.emplace_back(tensor.storage(), twin);
    return with_storage(tensor, twin, DispatchKey::CPU);
  }

  at::Tensor device(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu()) return tensor;
    for (const auto& [device, host] : pairs_)
      if (host.unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl()) return with_storage(tensor, device, DispatchKey::CUDA);
    Storage twin(Storage::use_byte_size_t(), tensor.storage().nbytes(), shared(tensor.storage(), device_), &device_memory, true);
    return with_storage(tensor, twin, DispatchKey::CUDA);
  }

  // A kernel that enlarged an output gave the host's side other memory.
  void adopt_enlarged() {
    for (auto& [device, host] : pairs_) {
      if (host.data() == device.data()) continue;
      device.set_data_ptr_noswap(shared(host, device_));
      device.set_nbytes(host.nbytes());
    }
  }

  IValue host(const IValue& value) { return mapped(value, [this](const at::Tensor& tensor) { return host(tensor); }); }
  IValue device(const IValue& value) { return mapped(value, [this](const at::Tensor& tensor) { return device(tensor); }); }

 private:
  template <typename Map>
  static IValue mapped(const IValue& value, const Map& map) {
    if (value.isTensor()) return map(value.toTensor());
    if (!value.isList() || value.isIntList() || value.isDoubleList() || value.isBoolList()) return value;
    auto old = value.toList();
    c10::impl::GenericList list(old.elementType());
    for (const IValue& element : old) list.push_back(mapped(element, map));
    return list;
  }

  Device device_;
  std::vector<std::pair<Storage, Storage>> pairs_;
};

// --- waits of the host for the device --------------------------------------------------------------------------------

void (*on_wait)(const char*) = nullptr;

void report_wait(const char* what) { if (on_wait) on_wait(what); }

// Operators whose result has a size, or is a number, that only the device knows.
const std::set<std::string> kWaiting{"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::bincount", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"};
// Operators that take an index or a mask by its values.
const std::set<std::string> kIndexed{"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};

void report_waits(const c10::FunctionSchema& schema, const std::vector<IValue>& operands) {
  if (kWaiting.count(schema.name())) return report_wait(schema.name().c_str());
  if (!kIndexed.count(schema.name())) return;
  for (const IValue& index : operands[1].toListRef())
    if (index.isTensor() && (index.toTensor().scalar_type() == at::kBool || index.toTensor().scalar_type() == at::kByte))
      return report_wait("index with a mask");
}

// --- any operator: the CPU's kernel on the same memory ----------------------------------------------------------------

void each_tensor(const IValue& value, const std::function<void(const at::Tensor&)>& visit) {
  if (value.isTensor()) { if (value.toTensor().defined()) visit(value.toTensor()); }
  else if (value.isTensorList() || value.isOptionalTensorList()) for (const IValue& element : value.toListRef()) each_tensor(element, visit);
}

// The device of the operands. Beside them the host may have numbers (tensors without dimensions) and indices.
Device device_of(const c10::FunctionSchema& schema, const std::vector<IValue>& operands) {
  std::optional<Device> found;
  bool on_host = false;
  for (size_t at = 0; at < operands.size(); ++at) {
    if (operands[at].isDevice() && operands[at].toDevice().is_cuda() && !found) found = operands[at].toDevice();
    each_tensor(operands[at], [&](const at::Tensor& tensor) {
      if (!tensor.is_cuda()) { on_host |= tensor.dim() > 0 && !(at == 1 && kIndexed.count(schema.name())); return; }
      TORCH_CHECK(!found || *found == tensor.device(), schema.name(), ": operands are on ", *found, " and ", tensor.device());
      found = tensor.device();
    });
  }
  TORCH_CHECK(!(found && on_host), schema.name(), ": operands are on ", *found, " and on cpu");
  const Device device = found.value_or(here());
  return device.has_index() ? device : here();
}

// FusedAdamWKernel.cu: parameters, gradients and states of one type and stride; the counts of steps in float32.
void check_fused_optimizer(const c10::FunctionSchema& schema, const std::vector<IValue>& operands) {
  const auto parameters = operands[0].toTensorVector();
  for (size_t list = 1; list < 4; ++list) {
    const auto tensors = operands[list].toTensorVector();
    for (size_t at = 0; at < tensors.size(); ++at)
      TORCH_CHECK(tensors[at].scalar_type() == parameters[at].scalar_type() && tensors[at].strides() == parameters[at].strides(),
                  schema.name(), ": params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and layout");
  }
  for (const at::Tensor& steps : operands[5].toTensorVector())
    TORCH_CHECK(steps.is_cuda() && steps.scalar_type() == at::kFloat, schema.name(), ": state_steps must be float32 on the device");
}

void run_on_host(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto arguments = torch::jit::last(stack, schema.arguments().size());
  const std::vector<IValue> operands(arguments.begin(), arguments.end());
  const Device device = device_of(schema, operands);
  report_waits(schema, operands);
  if (schema.name() == "aten::_fused_adamw_" || schema.name() == "aten::_fused_adam_") check_fused_optimizer(schema, operands);
  Views views(device);
  torch::jit::drop(*stack, operands.size());
  for (const IValue& operand : operands)
    stack->push_back(operand.isDevice() && operand.toDevice().is_cuda() ? IValue(Device(DeviceType::CPU)) : views.host(operand));
  {
    at::AutoDispatchBelowAutograd below;
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  }
  views.adopt_enlarged();
  const auto results = torch::jit::pop(*stack, schema.returns().size());
  for (size_t at = 0; at < results.size(); ++at) {
    const auto* alias = schema.returns()[at].alias_info();
    IValue result = views.device(results[at]);
    for (size_t from = 0; alias && alias->isWrite() && from < operands.size(); ++from) {
      const auto* written = schema.arguments()[from].alias_info();
      if (!written || !(*written == *alias)) continue;
      // The caller gets back the very tensor it passed, with the size that an `out=` operator gave it.
      if (operands[from].isTensor() && operands[from].toTensor().sizes() != result.toTensor().sizes()) {
        const at::Tensor now = result.toTensor();
        auto* impl = operands[from].toTensor().unsafeGetTensorImpl();
        impl->set_sizes_and_strides(now.sizes(), now.strides(), now.storage_offset());
      }
      result = operands[from];
    }
    stack->push_back(std::move(result));
  }
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.is_cuda() != source.is_cuda()) {
    const at::Tensor& host = self.is_cuda() ? source : self;
    // A copy into pageable memory always waits, one out of it is staged; any other waits unless it is told not to.
    if (!non_blocking || (self.is_cpu() && !is_pinned(host.const_data_ptr())))
      report_wait(self.is_cuda() ? "copy to the device" : "copy to the host");
  }
  Views views(here());
  at::AutoDispatchBelowAutograd below;
  views.host(self).copy_(views.host(source));
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  at::Tensor target = to;
  return copy_(target, self, non_blocking);
}

void record_stream(at::Tensor&, c10::Stream) {}

// SDPA as products and a softmax: fused kernels are CUDA's own, and the CPU's one knows no tensor of another device.
int64_t sdpa_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double,
                    bool, std::optional<double>, bool) { return 0; }

// Collectives reach gloo, registered for another device (soft_nccl.py), as tensors of the host on the same memory.
void run_collective(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  Views views(here());
  const auto operands = torch::jit::pop(*stack, op.schema().arguments().size());
  for (const IValue& operand : operands) {
    each_tensor(operand, [&](const at::Tensor& tensor) {
      TORCH_CHECK(tensor.is_cuda() && tensor.device() == here(), op.schema().name(), " on ", here(), " got a tensor on ", tensor.device());
      TORCH_CHECK(tensor.is_non_overlapping_and_dense(), "Tensors must be contiguous");
    });
    stack->push_back(views.host(operand));
  }
  at::AutoDispatchBelowAutograd below;
  op.redispatchBoxed(DispatchKeySet(DispatchKey::PrivateUse1), stack);
  for (auto& result : torch::jit::pop(*stack, op.schema().returns().size())) stack->push_back(views.device(result));
}

// For kernels written in Python (soft_kernels.py).
at::Tensor host_view(const at::Tensor& tensor) { return Views(tensor.device()).host(tensor); }
at::Tensor device_view(const at::Tensor& tensor, const at::Tensor& like) { return Views(like.device()).device(tensor); }
}  // namespace

namespace at {
struct Hooks : CUDAHooksInterface {
  Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { exchange(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return exchange(device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchange(device); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
  void deviceSynchronize(DeviceIndex) const override { report_wait("synchronize"); }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
namespace detail { C10_REGISTER_GUARD_IMPL(CUDA, Guard); }
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("set_", TORCH_FN(set_nothing));
  m.impl("set_.source_Storage", TORCH_FN(set_storage));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage_offset));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("_fused_sdp_choice", TORCH_FN(sdpa_choice));
}

TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const char* name : {"send", "recv_", "recv_any_source_", "broadcast_", "allreduce_", "allreduce_coalesced_",
                           "allgather_", "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_",
                           "reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "reduce_",
                           "gather_", "scatter_", "alltoall_", "alltoall_base_", "barrier"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_collective>());
}

TORCH_LIBRARY(soft_cuda, m) {
  m.def("resize_storage(Tensor tensor, int bytes) -> ()");
  m.def("host_view(Tensor tensor) -> Tensor");
  m.def("device_view(Tensor tensor, Tensor like) -> Tensor");
}
TORCH_LIBRARY_IMPL(soft_cuda, CompositeExplicitAutograd, m) {
  m.impl("resize_storage", TORCH_FN(resize_storage));
  m.impl("host_view", TORCH_FN(host_view));
  m.impl("device_view", TORCH_FN(device_view));
}

extern "C" {
// A negative number changes nothing, as in CUDA.
int soft_cuda_exchange(int device) { return exchange(static_cast<DeviceIndex>(device)); }
void soft_cuda_report_waits(void (*callback)(const char*)) { on_wait = callback; }
}
