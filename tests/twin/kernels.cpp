// The twin's kernels: each operation runs the CPU's on the same memory. Mixing devices raises; host reads are recorded.
#include "device.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/ones_like.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <unordered_map>
#include <unordered_set>

namespace twin {
namespace {

using c10::IValue;

bool on_twin(const at::Tensor& t) { return t.defined() && t.device().type() == TYPE; }

// Operations whose result's shape or branch the host must know: CUDA waits for the device in them.
const std::unordered_set<std::string> READERS{
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::_unique", "aten::unique_dim", "aten::unique_consecutive",
    "aten::unique_dim_consecutive", "aten::equal", "aten::bincount", "aten::masked_scatter"};
// Operations that take tensors of two devices: indices may be the host's, which CUDA uploads.
const std::unordered_set<std::string> INDEXING{"aten::index", "aten::_index_put_impl_", "aten::index_put_", "aten::index_put"};

// One call of an operation: its tensors as the CPU sees them, and back.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : schema_(op.schema()), name_(op.operator_name().name) {}

  void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    auto begin = stack->size() - schema_.arguments().size();
    look(*stack, begin);
    begin_operation();
    for (size_t i = begin; i < stack->size(); i++) (*stack)[i] = host((*stack)[i], schema_.arguments()[i - begin]);
    op.callBoxed(stack);
    for (size_t i = stack->size() - schema_.returns().size(); i < stack->size(); i++) (*stack)[i] = back((*stack)[i]);
    for (auto& [alias, t] : originals_) follow(*alias, t);
    for (auto& t : written_) writes(t, name_);
  }

  at::Tensor host(const at::Tensor& t) {
    if (!on_twin(t)) return t;
    auto* of = t.storage().unsafeGetStorageImpl();
    auto found = storages_.find(of);
    if (found == storages_.end()) {
      auto* keep = new c10::Storage(t.storage());
      c10::DataPtr data(t.storage().mutable_data(), keep, [](void* kept) { delete static_cast<c10::Storage*>(kept); }, c10::kCPU);
      c10::Storage made(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), c10::GetCPUAllocator(), true);
      found = storages_.emplace(of, made).first;
      twins_.emplace(made.unsafeGetStorageImpl(), t.storage());
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.is_conj()) made._set_conj(true);
    if (t.is_neg()) made._set_neg(true);
    originals_.emplace(made.unsafeGetTensorImpl(), t);
    aliases_.push_back(made); // whose address is the key: it lives as long as the call
    return made;
  }

  at::Tensor back(const at::Tensor& t) {
    if (!t.defined() || t.device().type() != c10::kCPU || stays_) return t;
    auto original = originals_.find(t.unsafeGetTensorImpl());
    if (original != originals_.end()) return original->second;
    auto of = t.storage().unsafeGetStorageImpl();
    auto storage = twins_.find(of);
    if (storage == twins_.end()) storage = twins_.emplace(of, storage_of(t.storage())).first;
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(storage->second), c10::DispatchKeySet(c10::DispatchKey::CUDA), t.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.is_conj()) made._set_conj(true);
    if (t.is_neg()) made._set_neg(true);
    if (!views_) writes(made, name_);
    return made;
  }

 private:
  // Which devices the arguments are on, before anything changes.
  void look(const torch::jit::Stack& stack, size_t begin) {
    std::vector<at::Tensor> all;
    std::vector<at::Tensor> indices;
    bool mask = false, cast = name_ == "aten::_to_copy";
    for (size_t i = begin; i < stack.size(); i++) {
      auto& v = stack[i];
      std::vector<at::Tensor> of;
      if (v.isTensor()) of.push_back(v.toTensor());
      else if (nested(schema_.arguments()[i - begin])) for (const IValue& e : v.toListRef()) for (const at::Tensor& t : e.toTensorVector()) of.push_back(t);
      else if (v.isTensorList()) for (const at::Tensor& t : v.toTensorVector()) of.push_back(t);
      else if (v.isList()) for (const IValue& e : v.toListRef()) if (e.isTensor()) of.push_back(e.toTensor());
      bool is_indices = INDEXING.count(name_) && schema_.arguments()[i - begin].name() == "indices";
      for (auto& t : of) {
        if (!t.defined()) continue;
        if (is_indices) {
          mask |= t.scalar_type() == at::kBool || t.scalar_type() == at::kByte;
          if (!on_twin(t) && t.dim()) record(pinned(t) ? "blocking upload" : "unpinned upload", name_, t.nbytes());
          continue;
        }
        all.push_back(t);
      }
      if (v.isDevice() && v.toDevice().type() == c10::kCPU) stays_ = true;
    }
    c10::DeviceIndex device = -1;
    int64_t others = 0, ours = 0;
    for (auto& t : all) {
      if (on_twin(t)) {
        ours++;
        if (device >= 0 && device != t.device().index()) record("mixed devices", name_, 2);
        device = t.device().index();
      } else if (t.dim() && t.device().type() != c10::kMeta) {
        others++;
      }
    }
    if (ours && others && !cast) record("mixed devices", name_, others);
    views_ = false;
    for (auto& r : schema_.returns()) views_ |= r.alias_info() && !r.alias_info()->isWrite();
    if (READERS.count(name_) || (mask && !masked_fill(stack, begin)) ||
        (name_ == "aten::repeat_interleave" && stack.back().isNone())) {
      record("read", name_, 0);
      wait_for_stream();
    }
    random_ = device;
  }

  // A result given as `out` may have been resized.
  void follow(const c10::TensorImpl& alias, const at::Tensor& t) {
    auto& host = alias.storage();
    if (host.data() != t.storage().data()) {
      auto moved = storage_of(host);
      t.storage().set_data_ptr_noswap(std::move(moved.mutable_data_ptr()));
      t.storage().set_nbytes(host.nbytes());
    }
    if (alias.sizes() != t.sizes() || alias.strides() != t.strides() || alias.storage_offset() != t.storage_offset())
      t.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
  }

  bool masked_fill(const torch::jit::Stack& stack, size_t begin) { // index_put_ with one mask and one value needs no read
    if (name_ == "aten::index") return false;
    return stack[begin + 1].toListRef().size() == 1 && stack[begin + 2].toTensor().numel() == 1;
  }

  static bool nested(const c10::Argument& argument) { return argument.type()->str() == "Tensor[][]"; }

  IValue host(const IValue& v, const c10::Argument& argument) {
    bool is_written = argument.alias_info() && argument.alias_info()->isWrite();
    is_written |= name_.rfind("c10d::", 0) == 0 && argument.name().rfind("input", 0) != 0; // whose schemas don't say so
    auto use = [&](const at::Tensor& t) {
      if (on_twin(t) && is_written) written_.push_back(t);
      if (on_twin(t) && !views_) reads(t, name_);
      return host(t);
    };
    if (v.isTensor()) return use(v.toTensor());
    if (nested(argument)) {
      c10::List<c10::List<at::Tensor>> made;
      for (const IValue& e : v.toListRef()) {
        c10::List<at::Tensor> inner;
        for (auto& t : e.toTensorVector()) inner.push_back(use(t));
        made.push_back(inner);
      }
      return made;
    }
    if (v.isTensorList()) {
      std::vector<at::Tensor> made;
      for (auto& t : v.toTensorVector()) made.push_back(use(t));
      return made;
    }
    if (v.isList() && argument.type()->str() == "Tensor?[]" ) {
      c10::List<std::optional<at::Tensor>> made;
      for (const IValue& e : v.toListRef()) made.push_back(e.isTensor() ? std::optional<at::Tensor>(use(e.toTensor())) : std::nullopt);
      return made;
    }
    if (v.isDevice() && v.toDevice().type() == TYPE) return c10::Device(c10::kCPU);
    if (v.isGenerator()) return generator(v.toGenerator());
    if (v.isNone() && argument.name() == "generator") return generator(default_generator(random_));
    return v;
  }

  IValue back(const IValue& v) {
    if (v.isTensor()) return back(v.toTensor());
    if (v.isTensorList()) {
      std::vector<at::Tensor> made;
      for (auto& t : v.toTensorVector()) made.push_back(back(t));
      return made;
    }
    return v;
  }

  const c10::FunctionSchema& schema_;
  std::string name_;
  bool views_ = false, stays_ = false;
  int64_t random_ = -1;
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages_, twins_;
  std::unordered_map<c10::TensorImpl*, at::Tensor> originals_;
  std::vector<at::Tensor> aliases_, written_;
};

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op).run(op, stack); }

at::Tensor on_host(const at::Tensor& t) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::alias", "");
  return Call(op).host(t); // keeps the memory
}

// A GPU has a kernel for bf16; of other types it reads the groups' ends.
void grouped_mm(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto& first = (*stack)[stack->size() - op.schema().arguments().size()];
  if (first.toTensor().scalar_type() != at::kBFloat16) record("read", "aten::_grouped_mm", 0);
  on_cpu(op, stack);
}

// A GPU has a kernel from fp16 to fp32, and back; the CPU has one type.
void softmax_to_float(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto& halves = (*stack)[stack->size() - 3];
  auto& widens = (*stack)[stack->size() - 1];
  if (widens.toBool()) {
    halves = halves.toTensor().to(at::kFloat);
    widens = false;
  }
  on_cpu(op, stack);
}
void softmax_from_float(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto& type = (*stack)[stack->size() - 1];
  auto narrow = type.toScalarType();
  type = (*stack)[stack->size() - 4].toTensor().scalar_type();
  on_cpu(op, stack);
  auto& grad = (*stack)[stack->size() - 1];
  grad = grad.toTensor().to(narrow);
}

at::Tensor as_twin(const at::Tensor& t) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::alias", "");
  return Call(op).back(t);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(c10::Device(TYPE)));
  auto type = dtype.value_or(at::get_default_dtype_as_scalartype());
  return at::detail::empty_strided_generic(size, stride, c10::GetAllocator(TYPE), c10::DispatchKeySet(c10::DispatchKey::CUDA), type);
}
at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(c10::Device(TYPE)));
  auto type = dtype.value_or(at::get_default_dtype_as_scalartype());
  return at::detail::empty_generic(size, c10::GetAllocator(TYPE), c10::DispatchKeySet(c10::DispatchKey::CUDA), type, format);
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (!to.numel()) return to;
  auto bytes = static_cast<int64_t>(from.nbytes());
  begin_operation();
  auto values = on_host(from);
  auto place = on_host(to);
  if (on_twin(from)) reads(from, "copy_");
  if (on_twin(to)) writes(to, "copy_");
  if (on_twin(to) && !on_twin(from)) {
    bool is_pinned = pinned(from);
    record(!is_pinned ? "unpinned upload" : non_blocking ? "upload" : "blocking upload", "copy_", bytes);
    if (is_pinned) arrive(from, "copy_");
    if (is_pinned && non_blocking && from.is_non_overlapping_and_dense()) defer_check(from, from.clone());
  } else if (!on_twin(to)) {
    if (non_blocking && pinned(to) && to.is_contiguous()) {
      record("deferred read", "copy_", bytes);
      defer_copy(to, values.to(to.options().device(c10::kCPU)).expand_as(to).clone(at::MemoryFormat::Contiguous));
      return to;
    }
    record("read", "copy_", bytes);
    wait_for_stream();
  }
  place.copy_(values);
  return to;
}
at::Tensor _copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  auto place = to;
  return copy_(place, from, non_blocking);
}

const at::Tensor& resize_(const at::Tensor& t, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = t.unsafeGetTensorImpl();
  auto needed = static_cast<size_t>((c10::multiply_integers(size) + t.storage_offset()) * t.dtype().itemsize());
  if (needed > t.storage().nbytes()) {
    auto data = c10::GetAllocator(TYPE)->allocate(needed);
    std::memcpy(data.get(), t.storage().data(), t.storage().nbytes());
    t.storage().set_data_ptr_noswap(std::move(data));
    t.storage().set_nbytes(needed);
  }
  impl->set_sizes_contiguous(size);
  return t;
}
at::Tensor& set_storage(at::Tensor& t, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_storage_offset(offset);
  if (stride.size() == size.size()) impl->set_sizes_and_strides(size, stride, offset);
  else impl->set_sizes_contiguous(size);
  return t;
}
at::Tensor& set_whole(at::Tensor& t, at::Storage source) {
  auto size = static_cast<int64_t>(source.nbytes() / t.dtype().itemsize());
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  t.unsafeGetTensorImpl()->set_storage_offset(0);
  t.unsafeGetTensorImpl()->set_sizes_contiguous({size});
  return t;
}
at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& source) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(source.storage());
  t.unsafeGetTensorImpl()->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return t;
}
at::Tensor& set_nothing(at::Tensor& t) {
  auto empty = at::empty({0}, t.options());
  return set_tensor(t, empty);
}

at::Tensor as_strided(const at::Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(t.storage()), t.key_set(), t.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(t.storage_offset()));
  return made;
}

int64_t math_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
                       std::optional<double>, bool) {
  return 0;
}
std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& t, double p, std::optional<bool> train) {
  if (!train.value_or(true)) return {t.clone(), at::ones_like(t, at::kBool)};
  auto mask = at::empty_like(t).bernoulli_(1 - p);
  return {t.mul(mask.div(1 - p)), mask.to(at::kBool)};
}
void record_stream(at::Tensor& t, at::Stream stream) {
  c10::impl::VirtualGuardImpl(TYPE).recordDataPtrOnStream(t.storage().data_ptr(), stream);
}
at::Tensor histc(const at::Tensor& t, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  begin_operation();
  reads(t, "histc");
  auto counts = at::histc(on_host(t).to(at::kDouble), bins, low, high).to(t.scalar_type()); // the CPU has none of integers
  return as_twin(counts);
}
at::Scalar local_scalar(const at::Tensor& t) {
  begin_operation();
  reads(t, "item");
  record("read", "item", static_cast<int64_t>(t.nbytes()));
  wait_for_stream();
  return at::_local_scalar_dense(on_host(t));
}

} // namespace
} // namespace twin

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&twin::on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &twin::empty);
  m.impl("empty_strided", &twin::empty_strided);
  m.impl("copy_", &twin::copy_);
  m.impl("_copy_from", &twin::_copy_from);
  m.impl("resize_", &twin::resize_);
  m.impl("set_.source_Storage_storage_offset", &twin::set_storage);
  m.impl("set_.source_Storage", &twin::set_whole);
  m.impl("set_.source_Tensor", &twin::set_tensor);
  m.impl("set_", &twin::set_nothing);
  m.impl("as_strided", &twin::as_strided);
  m.impl("_fused_sdp_choice", &twin::math_attention);
  m.impl("native_dropout", &twin::native_dropout);
  m.impl("histc", &twin::histc);
  m.impl("record_stream", &twin::record_stream);
  m.impl("_local_scalar_dense", &twin::local_scalar);
  m.impl("_grouped_mm", torch::CppFunction::makeFromBoxedFunction<&twin::grouped_mm>());
  for (auto* name : {"_softmax", "_log_softmax"}) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&twin::softmax_to_float>());
  for (auto* name : {"_softmax_backward_data", "_log_softmax_backward_data"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&twin::softmax_from_float>());
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&twin::on_cpu>());
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&twin::on_cpu>());
}

TORCH_LIBRARY_IMPL(c10d, CUDA, m) { // collectives run the host's, on the same memory
  for (auto* name : {"broadcast_", "allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_", "allgather_coalesced_",
                     "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
                     "reduce_scatter_tensor_coalesced_", "reduce_", "gather_", "scatter_", "alltoall_", "alltoall_base_", "barrier",
                     "send", "recv_", "recv_any_source_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&twin::on_cpu>());
}
