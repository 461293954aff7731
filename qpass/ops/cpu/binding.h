// What calls of the operators have in common: what is remembered of earlier ones, how tensors are looked at and made.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <locale>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <sstream>
#include <string>
#include <vector>

#include "extras.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

using torch::stable::Tensor;
using Part = std::optional<Tensor>;

namespace {

// The arguments of a matrix to a kernel but for pointers, rows and columns.
struct Stored {
  const void* spec;
  int64_t scale_rows, outer_rows;
};

using LinearKernel = void (*)(const void* spec, const void* data, const void* scale, const void* zero, const void* outer, int64_t n, int64_t k,
                              int64_t scale_rows, int64_t outer_rows, const void* x, const void* bias, void* y, int64_t count,
                              int32_t dtype, int32_t bias_dtype, int32_t int8, const Around* around, int32_t threads);
struct LinearCall {
  LinearKernel kernel;
  Stored weight;
  int64_t most_rows;  // of x that go to the kernel at once
  int32_t int8;
};

using AttentionKernel = void (*)(const void*, const void*, const void*, const void*, const void*, int64_t, int64_t, int64_t, int64_t,
                                 const void*, const void*, const void*, const void*, const void*, int64_t, int64_t, int64_t, int64_t,
                                 const float* q, const void* mask, const int64_t* sizes, int32_t mask_type, int32_t causal, float scale,
                                 void* out, int32_t dtype, const Extras* more, int32_t threads);
// How rows are changed before they are stored: see Frame of extras.h. Static scales are `heads` of those in the call; 0: none.
struct Change {
  const float* rotation;
  int64_t heads;

  Frame with(const void* scale) const { return {rotation, heads ? (const float*)scale : nullptr, heads}; }
};

struct AttentionCall {
  AttentionKernel kernel;
  Stored keys, values;
  Change k_change, v_change;
  int64_t k_capacity, v_capacity, most_queries;
};

using QuantizeKernel = int64_t (*)(const void*, const void*, const void*, const void*, const void*, int64_t, int64_t, int64_t, int64_t,
                                   const void* x, int64_t tokens, int32_t dtype, const Frame* frame, int32_t threads);
struct QuantizeCall {
  QuantizeKernel kernel;
  Stored stored;
  Change change;
  int64_t n, k, tokens, slots;  // bit i of slots: whether data, scale, zero point, outer scale is stored
};
// What a call with these inputs gives.
struct QuantizeParts {
  QuantizeCall call;
  std::vector<std::pair<int32_t, std::vector<int64_t>>> parts;  // type, sizes
  std::vector<int64_t> bytes;                                   // of an element
};

// What is left of a call that kernels serve when only memory changes: that of the arguments, in order (lists one by one, null if
// not given), and of the results. Gives whether it could; if not, nothing that it has written counts.
using Run = std::function<bool(void* const* given, void* const* made)>;
// Where this thread wants to have it of the operator that it calls.
thread_local Run* wanted_run = nullptr;

template <class Body> bool serve(const Body& body, std::initializer_list<void*> given, std::initializer_list<void*> made) {
  if (wanted_run) *wanted_run = body;
  return body(given.begin(), made.begin());
}

// Counts up when what is remembered no longer holds.
std::atomic<int64_t> generation{0};

// What Python looks at before it calls a kernel.
using Layout = std::vector<int64_t>;

template <class Call> struct Memory {
  std::map<std::pair<std::string, Layout>, Call> calls;
  std::shared_mutex mutex;

  std::optional<Call> find(const std::pair<std::string, Layout>& key) {
    std::shared_lock lock(mutex);
    auto found = calls.find(key);
    return found == calls.end() ? std::nullopt : std::optional(found->second);
  }
  void keep(const std::pair<std::string, Layout>& key, const Call& call) {
    std::unique_lock lock(mutex);
    if (calls.size() >= 1024) calls.clear();  // a cache that grows has a new layout at each step
    calls[key] = call;
  }
  void forget() {
    std::unique_lock lock(mutex);
    calls.clear();
  }
};

Memory<LinearCall> linear_calls;
Memory<AttentionCall> attention_calls;
Memory<QuantizeParts> quantize_calls;
// What Python says of the call that it was asked for by this thread.
thread_local std::optional<LinearCall> linear_answer;
thread_local std::optional<AttentionCall> attention_answer;
thread_local std::optional<QuantizeCall> quantize_answer;

void look_at(const Tensor& x, Layout& layout) {
  layout.push_back(int64_t(x.scalar_type()));
  layout.push_back(x.dim());
  for (int64_t i = 0; i < x.dim(); i++) layout.push_back(x.size(i)), layout.push_back(x.stride(i));
}
// As if its numbers lay in order.
void look_at_in_order(const Tensor& x, Layout& layout) {
  layout.push_back(int64_t(x.scalar_type()));
  layout.push_back(x.dim());
  size_t first = layout.size();
  int64_t stride = 1;
  for (int64_t i = 0; i < x.dim(); i++) layout.push_back(x.size(i)), layout.push_back(0);
  for (int64_t i = x.dim(); i-- > 0;) layout[first + 2 * i + 1] = stride, stride *= x.size(i);
}
void look_at(const Part& x, Layout& layout) {
  if (x) look_at(*x, layout);
  else layout.push_back(-1);
}

void* data(const Part& x) { return x ? (void*)x->const_data_ptr() : nullptr; }
void* data(const Tensor& x) { return (void*)x.const_data_ptr(); }
// Of what is written to.
void* own(const Tensor& x) { return x.mutable_data_ptr(); }

// enum Dtype of weight.h; -1 for other types.
int32_t dtype_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  auto type = x.scalar_type();
  return type == ScalarType::Float ? 0 : type == ScalarType::BFloat16 ? 1 : type == ScalarType::Half ? 2 : -1;
}

int32_t type_of(const Tensor& x) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
  return type;
}

Tensor empty(const std::vector<int64_t>& sizes, int32_t type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  AtenTensorHandle y;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), type, aoti_torch_device_type_cpu(), 0, &y));
  return Tensor(y);
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

template <class Result = Tensor, class... T> Result in_python(const char* name, const T&... arguments) {
  if (wanted_run) *wanted_run = nullptr, wanted_run = nullptr;  // operators that Python calls are others
  StableIValue stack[] = {torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
  if constexpr (std::is_same_v<Result, Three>)
    return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
            torch::stable::detail::to<Tensor>(stack[2])};
  else
    return torch::stable::detail::to<Result>(stack[0]);
}

// One of `size` numbers side by side, or none.
bool is_vector(const Part& x, int64_t size) { return !x || (x->dim() == 1 && x->size(0) == size && x->is_contiguous()); }

// Like a contiguous tensor of these sizes, or none.
bool has_sizes(const Part& x, const std::vector<int64_t>& sizes, const Tensor& like) {
  if (!x) return true;
  bool same = x->dim() == int64_t(sizes.size()) && x->scalar_type() == like.scalar_type() && x->is_contiguous();
  for (size_t i = 0; same && i < sizes.size(); i++) same = x->size(i) == sizes[i];
  return same;
}

// Numbers as floats and back, of the types that the code around the kernels computes with itself: float32, and bfloat16 as its bits.
inline float as_float(float x) { return x; }
inline float as_float(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}
template <class T> T from_float(float x);
template <> inline float from_float(float x) { return x; }
template <> inline uint16_t from_float(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// Whether x is of these types.
inline bool is_computed(const Tensor& x) { return dtype_of(x) == 0 || dtype_of(x) == 1; }

// Numbers in order, as float32. `slot`: of those that are needed at once.
const float* in_float(const void* x, int64_t count, int32_t dtype, int slot) {
  if (dtype == 0 || !x) return (const float*)x;
  static thread_local std::vector<float> slots[5];
  std::vector<float>& wide = slots[slot];
  if (int64_t(wide.size()) < count) wide.resize(count);
  for (int64_t i = 0; i < count; i++) wide[i] = as_float(((const uint16_t*)x)[i]);
  return wide.data();
}

// Rows of x [B, H, S, D], each of whose numbers lie side by side, put in order. `slot`: of those that are needed at once.
struct Gather {
  int64_t batch, heads, tokens, bytes, strides[3];  // bytes of a row, and from one to the next
  bool in_order;
  int slot;

  Gather(const Tensor& x, int slot)
      : batch(x.size(0)), heads(x.size(1)), tokens(x.size(2)), bytes(x.size(3) * x.element_size()), in_order(x.is_contiguous()), slot(slot) {
    for (int i = 0; i < 3; i++) strides[i] = x.stride(i) * x.element_size();
  }
  static bool serves(const Tensor& x) { return x.dim() == 4 && x.stride(3) == 1; }

  const void* operator()(const void* x) const {
    if (in_order || !x) return x;
    static thread_local std::vector<char> slots[2];
    std::vector<char>& rows = slots[slot];
    if (int64_t(rows.size()) < batch * heads * tokens * bytes) rows.resize(batch * heads * tokens * bytes);
    for (int64_t row = 0; row < batch * heads * tokens; row++) {
      int64_t t = row % tokens, h = row / tokens % heads, b = row / tokens / heads;
      std::memcpy(rows.data() + row * bytes, (const char*)x + b * strides[0] + h * strides[1] + t * strides[2], bytes);
    }
    return rows.data();
  }
  int64_t count(int64_t element) const { return batch * heads * tokens * bytes / element; }
};

}  // namespace
