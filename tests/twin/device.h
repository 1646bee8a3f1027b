// State of the twin: a device of type "cuda" whose memory is the host's, with streams, events, and records of what crosses.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace twin {

constexpr auto TYPE = c10::DeviceType::CUDA;
constexpr int DEVICES = 2;

// The number of the latest operation of each stream that is known to be done: a vector clock.
using Clock = std::map<int64_t, uint64_t>;

// One allocation on the device: who used it last, on which stream.
struct Block {
  void* data;
  size_t bytes;
  int64_t home;                        // the stream that it was allocated on
  int64_t writer = -1;                 // the stream that wrote it last, or -1
  uint64_t written = 0;                // the number of that operation in its stream
  std::map<int64_t, uint64_t> readers; // since then
  std::set<int64_t> recorded;          // streams given to record_stream
  c10::Storage host;                   // the host's storage that holds the memory, if a CPU kernel allocated it
};

Block* block(const at::Tensor& tensor);       // of a tensor on the twin; null if it holds nothing
c10::Storage storage_of(c10::Storage host);   // memory that a CPU kernel allocated becomes the twin's

int64_t current_stream();                     // of this thread on its current device
void begin_operation();                       // counts an operation on the current stream
void wait_for_stream();                       // the host waits for the current stream, as in a read
void reads(const at::Tensor& tensor, const std::string& by);
void writes(const at::Tensor& tensor, const std::string& by);
void defer_copy(const at::Tensor& pinned, const at::Tensor& values);  // to the host, done when somebody waits
void defer_check(const at::Tensor& pinned, const at::Tensor& values); // of a source that must stay until somebody waits
void arrive(const at::Tensor& pinned, const std::string& by); // copies to the memory that come before, in the device's order

bool pinned(const at::Tensor& host);
at::Generator generator(const at::Generator& twins); // the CPU's that draws the twin's numbers
at::Generator default_generator(int64_t device);

// Calls Python's recorder: what (read, upload, ...), the operation, bytes. Raises what Python raises.
void record(const char* what, const std::string& by, int64_t bytes);
void fault(const std::string& what); // where raising is impossible, as in a destructor

} // namespace twin
