// The twin's allocator, device guard, streams, events, and hooks.
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Generator.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

namespace twin {
namespace {

constexpr size_t FILLED = 16 << 20; // larger memory stays untouched, as DeepSpeed's buckets

std::recursive_mutex lock;
using Guard = std::lock_guard<std::recursive_mutex>;

struct Pending { // a copy between pinned memory and the device that nobody has waited for
  at::Tensor pinned, values;
  bool to_host;
  uint64_t at;
};
struct Freed { // memory that was freed while another stream may use it: the allocator would hand it out on its home stream
  size_t bytes;
  int64_t stream;
  uint64_t at;
};
struct State {
  std::map<int64_t, Clock> streams;
  Clock host; // what the host has waited for: whatever it launches then comes after
  std::map<int64_t, std::vector<Pending>> pending;
  std::map<int64_t, std::vector<Freed>> freed; // by the stream that may use the memory again
  std::map<const char*, size_t> pinned; // begin and size of each pinned allocation
  std::vector<at::Generator> generators;
  int64_t next_stream = DEVICES;
  int64_t allocated = 0, peak = 0;
};
State& state() {
  static auto* made = new State(); // lives to the end of the process
  return *made;
}
PyObject* recorder = nullptr;

thread_local c10::DeviceIndex device = 0; // a new thread starts on device 0
thread_local int64_t chosen[DEVICES] = {0, 1};

int64_t number(const c10::Stream& stream) { return stream.id() ? stream.id() : stream.device_index(); }
c10::Stream stream_of(int64_t number, c10::DeviceIndex index) {
  c10::Device on(TYPE, index);
  return number < DEVICES ? c10::Stream(c10::Stream::DEFAULT, on) : c10::Stream(c10::Stream::UNSAFE, on, number);
}
void merge(Clock& into, const Clock& from) {
  for (auto& [stream, at] : from) into[stream] = std::max(into[stream], at);
}
bool seen(const Clock& clock, int64_t stream, uint64_t at) {
  auto place = clock.find(stream);
  return place != clock.end() && place->second >= at;
}

// The host waits for all that `clock` covers: copies to it arrive, and sources of copies are looked at again.
void finish(const Clock& clock) {
  merge(state().host, clock);
  for (auto& [stream, at] : clock) {
    auto& all = state().pending[stream];
    std::vector<Pending> later;
    for (auto& one : all) {
      if (one.at > at) {
        later.push_back(one);
      } else if (one.to_host) {
        std::memcpy(one.pinned.data_ptr(), one.values.data_ptr(), one.values.nbytes());
      } else if (std::memcmp(one.pinned.data_ptr(), one.values.data_ptr(), one.values.nbytes())) {
        fault("pinned memory was changed before its upload was waited for");
      }
    }
    all = std::move(later);
  }
}

void free_block(void* context) {
  Guard guard(lock);
  auto* b = static_cast<Block*>(context);
  auto& home = state().streams[b->home];
  auto note = [&](int64_t stream, uint64_t at) {
    if (stream >= 0 && stream != b->home && !b->recorded.count(stream) && !seen(home, stream, at))
      state().freed[b->home].push_back({b->bytes, stream, at});
  };
  note(b->writer, b->written);
  for (auto& [stream, at] : b->readers) note(stream, at);
  state().allocated -= static_cast<int64_t>(b->bytes);
  if (!b->host) std::free(b->data);
  delete b;
}

c10::DataPtr data_ptr(void* data, size_t bytes, c10::Storage host) {
  Guard guard(lock);
  auto* b = new Block{data, bytes, current_stream()};
  b->host = std::move(host);
  auto& freed = state().freed[b->home];
  merge(state().streams[b->home], state().host);
  std::erase_if(freed, [&](const Freed& f) { return seen(state().streams[b->home], f.stream, f.at); });
  for (auto& f : freed)
    if (bytes && bytes <= f.bytes) fault("memory that stream " + std::to_string(f.stream) + " uses was freed without record_stream");
  std::erase_if(freed, [&](const Freed& f) { return bytes && bytes <= f.bytes; });
  state().allocated += static_cast<int64_t>(bytes);
  state().peak = std::max(state().peak, state().allocated);
  return {data, b, &free_block, c10::Device(TYPE, device)};
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    if (data && bytes <= FILLED) std::memset(data, 0xFF, bytes); // NaN: what is read before it is written shows
    return data_ptr(data, bytes, c10::Storage());
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

void free_pinned(void* data) {
  Guard guard(lock);
  state().pinned.erase(static_cast<const char*>(data));
  std::free(data);
}
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = std::aligned_alloc(64, (std::max<size_t>(bytes, 1) + 63) / 64 * 64);
    Guard guard(lock);
    state().pinned[static_cast<const char*>(data)] = std::max<size_t>(bytes, 1);
    return {data, data, &free_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;

bool pinned_at(const void* data) {
  Guard guard(lock);
  auto& all = state().pinned;
  auto after = all.upper_bound(static_cast<const char*>(data));
  if (after == all.begin()) return false;
  auto& [begin, bytes] = *std::prev(after);
  return static_cast<const char*>(data) < begin + bytes;
}

struct Generator final : c10::GeneratorImpl { // draws the CPU's numbers
  explicit Generator(c10::DeviceIndex index, at::Generator cpu = at::detail::createCPUGenerator())
      : c10::GeneratorImpl(c10::Device(TYPE, index), c10::DispatchKeySet(c10::DispatchKey::CUDA)), cpu(std::move(cpu)) {}
  at::Generator cpu;
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& to) override { cpu.unsafeGetGeneratorImpl()->set_state(to); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override { return new Generator(device().index(), cpu.clone()); }
};

struct Event { Clock clock; };
struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device to) const override {
    c10::Device before(TYPE, device);
    uncheckedSetDevice(to);
    return before;
  }
  c10::Device getDevice() const override { return {TYPE, device}; }
  void setDevice(c10::Device to) const override { uncheckedSetDevice(to); }
  void uncheckedSetDevice(c10::Device to) const noexcept override {
    if (to.has_index()) device = to.index();
  }
  c10::Stream getStream(c10::Device on) const override {
    auto index = on.has_index() ? on.index() : device;
    return stream_of(chosen[index], index);
  }
  c10::Stream getDefaultStream(c10::Device on) const override {
    return stream_of(0, on.has_index() ? on.index() : device);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device on, bool) const override { return getNewStream(on, 0); }
  c10::Stream getNewStream(c10::Device on, int) const override {
    Guard guard(lock);
    return stream_of(state().next_stream++, on.has_index() ? on.index() : device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(stream.device());
    chosen[stream.device_index()] = number(stream);
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    Guard guard(lock);
    if (!*event) *event = new Event();
    static_cast<Event*>(*event)->clock = state().streams[number(stream)];
  }
  void block(void* event, const c10::Stream& stream) const override {
    Guard guard(lock);
    if (event) merge(state().streams[number(stream)], static_cast<Event*>(event)->clock);
  }
  bool queryEvent(void* event) const override {
    Guard guard(lock);
    if (event) finish(static_cast<Event*>(event)->clock);
    return true;
  }
  void synchronizeEvent(void* event) const override {
    twin::record("synchronization", "event", 0);
    queryEvent(event);
  }
  bool queryStream(const c10::Stream& stream) const override {
    Guard guard(lock);
    finish(state().streams[number(stream)]);
    return true;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    twin::record("synchronization", "stream", 0);
    queryStream(stream);
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    twin::record("synchronization", "device", 0);
    Guard guard(lock);
    Clock everything;
    for (auto& [stream, clock] : state().streams) merge(everything, clock);
    for (auto& [stream, clock] : state().streams) merge(clock, everything);
    finish(everything);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    Guard guard(lock);
    if (data.get_deleter() == &free_block) static_cast<Block*>(data.get_context())->recorded.insert(number(stream));
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 1.0; }
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return DEVICES; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  c10::DeviceIndex current_device() const override { return device; }
  c10::DeviceIndex getCurrentDevice() const override { return device; }
  void setCurrentDevice(c10::DeviceIndex to) const override { device = to; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex to) const override { return std::exchange(device, to); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex to) const override { return exchangeDevice(to < 0 ? device : to); }
  bool isPinnedPtr(const void* data) const override { return pinned_at(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  c10::Device getDeviceFromPtr(void*) const override { return {TYPE, device}; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return state().generators.at(index < 0 ? device : index);
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? device : index);
  }
  void deviceSynchronize(c10::DeviceIndex index) const override { DeviceGuard().synchronizeDevice(index); }
};

bool unseen(int64_t stream, uint64_t at, const Clock& clock) {
  return stream >= 0 && stream != current_stream() && !seen(clock, stream, at);
}

} // namespace

int64_t current_stream() { return chosen[device]; }

void begin_operation() {
  Guard guard(lock);
  auto& clock = state().streams[current_stream()];
  merge(clock, state().host);
  clock[current_stream()]++;
}

void wait_for_stream() {
  Guard guard(lock);
  finish(state().streams[current_stream()]);
}

Block* block(const at::Tensor& tensor) {
  auto& data = tensor.storage().data_ptr();
  return data.get_deleter() == &free_block ? static_cast<Block*>(data.get_context()) : nullptr;
}

// Does this while our lock is held. Who holds Python's lock may wait for ours, so nothing may be recorded meanwhile.
template <class Work>
auto locked(Work work) {
  Guard guard(lock);
  return work();
}

void reads(const at::Tensor& tensor, const std::string& by) {
  bool late = locked([&] {
    auto* b = block(tensor);
    if (!b || !tensor.numel()) return false;
    auto& clock = state().streams[current_stream()];
    b->readers[current_stream()] = clock[current_stream()];
    return unseen(b->writer, b->written, clock);
  });
  if (late) record("unordered", by, static_cast<int64_t>(tensor.nbytes()));
}

void writes(const at::Tensor& tensor, const std::string& by) {
  bool late = locked([&] {
    auto* b = block(tensor);
    if (!b || !tensor.numel()) return false;
    auto& clock = state().streams[current_stream()];
    bool found = unseen(b->writer, b->written, clock);
    for (auto& [stream, at] : b->readers) found |= unseen(stream, at, clock);
    b->readers.clear();
    b->writer = current_stream();
    b->written = clock[current_stream()];
    return found;
  });
  if (late) record("unordered", by, static_cast<int64_t>(tensor.nbytes()));
}

c10::Storage storage_of(c10::Storage host) {
  void* data = host.mutable_data();
  auto bytes = host.nbytes();
  return {c10::Storage::use_byte_size_t(), bytes, data_ptr(data, bytes, std::move(host)), &device_allocator, true};
}

void defer_copy(const at::Tensor& to, const at::Tensor& values) {
  Guard guard(lock);
  auto* begin = static_cast<const char*>(to.data_ptr());
  for (auto& [stream, all] : state().pending) // uploads of this memory come before the copy, in the device's order
    std::erase_if(all, [&](const Pending& one) {
      auto* place = static_cast<const char*>(one.pinned.data_ptr());
      return !one.to_host && place < begin + to.nbytes() && begin < place + one.pinned.nbytes();
    });
  std::memset(to.data_ptr(), 0xFF, to.nbytes());
  state().pending[current_stream()].push_back({to, values, true, state().streams[current_stream()][current_stream()]});
}

void defer_check(const at::Tensor& from, const at::Tensor& values) {
  Guard guard(lock);
  state().pending[current_stream()].push_back({from, values, false, state().streams[current_stream()][current_stream()]});
}

void arrive(const at::Tensor& source, const std::string& by) {
  bool late = locked([&] {
    bool found = false;
    auto* begin = static_cast<const char*>(source.storage().data());
    for (auto& [stream, all] : state().pending) {
      for (auto& one : all) {
        auto* place = static_cast<const char*>(one.pinned.data_ptr());
        if (!one.to_host || place < begin || place >= begin + source.storage().nbytes()) continue;
        found |= unseen(stream, one.at, state().streams[current_stream()]);
        std::memcpy(one.pinned.data_ptr(), one.values.data_ptr(), one.values.nbytes());
        one.values = one.pinned.clone();
      }
    }
    return found;
  });
  if (late) record("unordered", by, 0);
}

bool pinned(const at::Tensor& host) { return pinned_at(host.storage().data()); }

at::Generator generator(const at::Generator& twins) {
  return twins.device().type() == TYPE ? static_cast<Generator*>(twins.unsafeGetGeneratorImpl())->cpu : twins;
}
at::Generator default_generator(int64_t index) { return state().generators.at(index < 0 ? device : index); }

void record(const char* what, const std::string& by, int64_t bytes) {
  if (!recorder) return;
  pybind11::gil_scoped_acquire python;
  pybind11::handle listener(recorder);
  listener(what, by, bytes);
}
void fault(const std::string& what) {
  if (!recorder || !Py_IsInitialized()) return;
  pybind11::gil_scoped_acquire python;
  pybind11::handle listener(recorder);
  listener("fault", what, 0);
}

} // namespace twin

namespace {

void start() {
  using namespace twin;
  for (int i = 0; i < DEVICES; i++) state().generators.push_back(at::make_generator<Generator>(i));
  c10::SetAllocator(TYPE, &device_allocator, 255);
  static DeviceGuard guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(TYPE)].store(&guard);
  // what a build without CUDA holds has no data: the twin's hooks take its place
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  start();
  m.def("listen", [](py::object to) { twin::recorder = to.is_none() ? nullptr : to.release().ptr(); });
  m.def("device", [] { return twin::device; });
  m.def("set_device", [](int to) { return std::exchange(twin::device, static_cast<c10::DeviceIndex>(to)); });
  m.def("generator", [](int index) { return py::reinterpret_steal<py::object>(THPGenerator_Wrap(twin::default_generator(index))); });
  m.def("synchronize", [] { twin::DeviceGuard().synchronizeDevice(twin::device); }, py::call_guard<py::gil_scoped_release>());
  m.def("memory", [] { return std::make_pair(twin::state().allocated, twin::state().peak); });
  m.def("reset_peak", [] { twin::state().peak = twin::state().allocated; });
}
