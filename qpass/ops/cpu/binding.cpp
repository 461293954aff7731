// torch.ops.qpass.linear, linears, quantize, attention and append on CPU tensors without Python, on torch's stable ABI: the same call takes a few
// microseconds instead of twenty-five to eighty.
//
// Only calls like one that Python (operators.py) has checked before are served here. "Like": everything that it looks at is
// equal, which is types and layouts of the stored parts, the spec, and the inputs' columns. Others go to Python, as `linear_checked`
// and the like; if it finds that a kernel can serve them, it says with what (qpass_remember_..) and that is kept.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
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
void look_at(const Part& x, Layout& layout) {
  if (x) look_at(*x, layout);
  else layout.push_back(-1);
}

const void* data(const Part& x) { return x ? x->const_data_ptr() : nullptr; }

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

int32_t gate_of(const std::string& name) { return name == "silu" ? SILU : name == "gelu" ? GELU : name == "gelu_tanh" ? GELU_TANH : NO_GATE; }

// x [.., K] -> [.., N], or [.., N / 2] with a gate
Tensor linear(const Tensor& x, const Tensor& w, const Part& scale, const Part& zero, const Part& outer, const Part& bias,
              std::string spec, const Part& norm, std::optional<double> eps, const Part& columns, std::string gate, const Part& residual) {
  int64_t dims = x.dim(), k = dims ? x.size(dims - 1) : 0, n = w.dim() ? w.size(0) : 0, count = k ? x.numel() / k : 0;
  int32_t dtype = dtype_of(x), bias_dtype = bias ? dtype_of(*bias) : 0;
  bool usual = dtype >= 0 && bias_dtype >= 0 && count && x.is_contiguous();
  usual = usual && is_vector(bias, n) && is_vector(norm, k) && is_vector(columns, k) && (!norm || dtype_of(*norm) >= 0);
  usual = usual && (!columns || dtype_of(*columns) == 0) && (gate.empty() || (n % 2 == 0 && gate_of(gate) != NO_GATE));
  std::vector<int64_t> sizes(dims);
  if (usual) {
    for (int64_t i = 0; i + 1 < dims; i++) sizes[i] = x.size(i);
    sizes[dims - 1] = gate.empty() ? n : n / 2;
    usual = has_sizes(residual, sizes, x);
  }
  std::pair<std::string, Layout> key;
  if (usual) {
    key.first = spec;
    key.second.reserve(32);
    key.second.push_back(k);
    key.second.push_back(dtype);
    for (const Part& part : {Part(w), scale, zero, outer}) look_at(part, key.second);
    if (auto call = linear_calls.find(key); call && count <= call->most_rows) {
      Around around{data(norm), (const float*)data(columns), data(residual), float(eps.value_or(0)), eps.has_value(),
                    norm ? dtype_of(*norm) : 0, gate_of(gate)};
      Tensor y = empty(sizes, type_of(x));
      call->kernel(call->weight.spec, w.const_data_ptr(), data(scale), data(zero), data(outer), n, k, call->weight.scale_rows, call->weight.outer_rows,
                   x.const_data_ptr(), data(bias), y.mutable_data_ptr(), count, dtype, bias_dtype, call->int8, &around,
                   int32_t(torch::stable::get_num_threads()));
      return y;
    }
  }
  linear_answer.reset();
  Tensor y = in_python("qpass::linear_checked", x, w, scale, zero, outer, bias, spec, norm, eps, columns, gate, residual);
  if (usual && linear_answer) linear_calls.keep(key, *linear_answer);
  return y;
}

// A linear of a row: see Step of steps.py.
struct Step {
  std::string spec, given, gate;
  std::optional<double> eps;
  int64_t residual;  // of which step; -1: none
  bool kept, added;  // given back; added to a later one's result
};
using Steps = std::shared_ptr<const std::vector<Step>>;

Memory<Steps> known_steps;

std::vector<std::string> cut(const std::string& text, char at) {
  std::vector<std::string> pieces(1);
  for (char c : text)
    if (c == at) pieces.emplace_back();
    else pieces.back() += c;
  return pieces;
}

// Of text that steps.py wrote and checked, when the graph was made.
Steps steps_of(const std::string& text) {
  std::pair<std::string, Layout> key{text, {}};
  if (auto known = known_steps.find(key)) return *known;
  auto steps = std::make_shared<std::vector<Step>>();
  for (const std::string& step : cut(text, '|')) {
    auto fields = cut(step, ';');
    STD_TORCH_CHECK(fields.size() == 6, "qpass::linears: a step has 6 fields: ", step);
    int64_t residual = fields[4].empty() ? -1 : std::stoll(fields[4]);
    STD_TORCH_CHECK(residual < int64_t(steps->size()), "qpass::linears: the result of a later step is added: ", step);
    std::optional<double> eps;
    if (!fields[2].empty()) {  // as C writes numbers, whatever the user's locale
      std::istringstream number(fields[2]);
      number.imbue(std::locale::classic());
      number >> eps.emplace();
    }
    steps->push_back({fields[0], fields[1], fields[3], eps, residual, fields[5] == "1", false});
    if (residual >= 0) (*steps)[residual].added = true;
  }
  known_steps.keep(key, steps);
  return steps;
}

// x [.., K] -> the last result, and the one that is kept
std::tuple<Tensor, Tensor> linears(const Tensor& x, std::vector<Tensor> tensors, std::string text) {
  auto steps = steps_of(text);
  std::vector<Part> added(steps->size());
  Part kept;
  Tensor y = x;
  size_t used = 0;
  for (size_t i = 0; i < steps->size(); i++) {
    const Step& step = (*steps)[i];
    Part given[8];  // in the order of LETTERS
    for (char letter : step.given) {
      size_t at = std::string("dszobncr").find(letter);
      STD_TORCH_CHECK(at < 8 && used < tensors.size(), "qpass::linears: ", tensors.size(), " tensors for steps ", text);
      given[at] = tensors[used++];
    }
    STD_TORCH_CHECK(given[0], "qpass::linears: a step without a weight: ", text);
    const auto& [w, scale, zero, outer, bias, norm, columns, residual] = given;
    y = linear(y, *w, scale, zero, outer, bias, step.spec, norm, step.eps, columns, step.gate, step.residual < 0 ? residual : added[step.residual]);
    if (step.added) added[i] = y;
    if (step.kept) kept = y;
  }
  STD_TORCH_CHECK(used == tensors.size(), "qpass::linears: ", tensors.size(), " tensors for steps ", text);
  return {y, kept ? *kept : empty({0}, type_of(x))};
}

// Strides with which a mask reads as [B, heads, queries, tokens], or nothing if it does not.
std::optional<std::vector<int64_t>> strides_of(const Tensor& mask, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(4, 0);
  int64_t skipped = 4 - mask.dim();
  if (skipped < 0) return std::nullopt;
  for (int64_t i = 0; i < mask.dim(); i++) {
    if (mask.size(i) == sizes[skipped + i]) strides[skipped + i] = mask.size(i) == 1 ? 0 : mask.stride(i);
    else if (mask.size(i) != 1) return std::nullopt;
  }
  return strides;
}

// q [B, heads, queries, D], keys [B, key heads, tokens, D], values [B, key heads, tokens, Dv] -> [B, heads, queries, Dv]
Tensor attention(const Tensor& q, const Tensor& k, const Part& k_scale, const Part& k_zero, const Part& k_outer, std::string k_spec,
                 const Tensor& v, const Part& v_scale, const Part& v_zero, const Part& v_outer, int64_t v_columns,
                 std::string v_spec, const Part& mask, bool causal, std::optional<double> scale, const Part& k_first,
                 const Part& v_first, const Part& k_last, const Part& v_last, const Part& start, double soft_cap, const Part& sinks) {
  using torch::headeronly::ScalarType;
  bool usual = q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.scalar_type() == ScalarType::Float && q.is_contiguous() && q.numel();
  std::optional<std::vector<int64_t>> strides(std::vector<int64_t>(4, 0));
  int32_t mask_type = 0;  // enum MaskType of attention.h
  if (usual && mask) {
    mask_type = mask->scalar_type() == ScalarType::Bool ? 1 : 2;
    usual = mask_type == 1 || mask->scalar_type() == ScalarType::Float;
    strides = strides_of(*mask, {q.size(0), q.size(1), q.size(2), k.size(2)});
    usual = usual && strides;
  }
  for (const Part& part : {k_first, v_first, k_last, v_last, sinks})
    usual = usual && (!part || (part->scalar_type() == ScalarType::Float && part->is_contiguous()));
  std::pair<std::string, Layout> key;
  if (usual) {
    key.first = k_spec + "," + v_spec;
    key.second.reserve(64);
    for (int64_t size : {q.size(0), q.size(1), q.size(3), v_columns}) key.second.push_back(size);
    for (const Part& part : {Part(k), k_scale, k_zero, k_outer, Part(v), v_scale, v_zero, v_outer}) look_at(part, key.second);
    if (auto call = attention_calls.find(key); call && q.size(2) <= call->most_queries) {
      Tensor y = empty({q.size(0), q.size(1), q.size(2), v_columns}, type_of(q));
      int64_t sizes[] = {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), call->k_capacity, call->v_capacity,
                         (*strides)[0], (*strides)[1], (*strides)[2], (*strides)[3]};
      int64_t heads = q.size(0) * k.size(1);
      auto floats = [](const Part& x) { return (const float*)data(x); };
      const Change &kc = call->k_change, &vc = call->v_change;
      Extras more{floats(k_first), floats(v_first), floats(k_last), floats(v_last), floats(sinks), k_first ? k_first->size(2) : 0,
                  k_last ? k_last->size(2) : 0, start ? *(const int64_t*)start->const_data_ptr() : 0, float(soft_cap),
                  kc.with(data(k_scale)), vc.with(data(v_scale))};
      const Stored &ks = call->keys, &vs = call->values;
      call->kernel(ks.spec, k.const_data_ptr(), kc.heads ? nullptr : data(k_scale), data(k_zero), data(k_outer), heads * call->k_capacity, q.size(3),
                   ks.scale_rows, ks.outer_rows, vs.spec, v.const_data_ptr(), vc.heads ? nullptr : data(v_scale), data(v_zero), data(v_outer),
                   heads * call->v_capacity, v_columns, vs.scale_rows, vs.outer_rows, (const float*)q.const_data_ptr(), data(mask), sizes, mask_type, causal,
                   scale ? float(*scale) : 1.0f / std::sqrt(float(q.size(3))), y.mutable_data_ptr(), 0, &more,
                   int32_t(torch::stable::get_num_threads()));
      return y;
    }
  }
  attention_answer.reset();
  Tensor y = in_python("qpass::attention_checked", q, k, k_scale, k_zero, k_outer, k_spec, v, v_scale, v_zero, v_outer, v_columns, v_spec,
                       mask, causal, scale, k_first, v_first, k_last, v_last, start, soft_cap, sinks);
  if (usual && attention_answer) attention_calls.keep(key, *attention_answer);
  return y;
}

// x [.., K] -> the parts that the spec has
std::vector<Tensor> quantize(const Tensor& x, std::string spec, const Part& static_scale) {
  int32_t dtype = dtype_of(x);
  bool usual = dtype >= 0 && x.numel() && x.is_contiguous();
  std::pair<std::string, Layout> key;
  if (usual) {
    key.first = spec;
    key.second.reserve(24);
    look_at(x, key.second);
    look_at(static_scale, key.second);
    if (auto known = quantize_calls.find(key)) {
      const QuantizeCall& call = known->call;
      std::vector<Tensor> parts;
      void* slots[4] = {};
      for (int slot = 0; slot < 4; slot++)
        if (call.slots >> slot & 1) {
          const auto& [type, sizes] = known->parts[parts.size()];
          parts.push_back(empty(sizes, type));
          slots[slot] = parts.back().mutable_data_ptr();
        }
      Frame frame = call.change.with(data(static_scale));
      if (!call.kernel(call.stored.spec, slots[0], slots[1], slots[2], slots[3], call.n, call.k, call.stored.scale_rows, call.stored.outer_rows,
                       x.const_data_ptr(), call.tokens, dtype, &frame, int32_t(torch::stable::get_num_threads())))
        return parts;  // else Python says what is wrong
    }
  }
  quantize_answer.reset();
  auto parts = in_python<std::vector<Tensor>>("qpass::quantize_checked", x, spec, static_scale);
  if (usual && quantize_answer) {
    QuantizeParts known{*quantize_answer, {}, {}};
    for (const Tensor& part : parts) {
      std::vector<int64_t> sizes(part.dim());
      for (int64_t i = 0; i < part.dim(); i++) sizes[i] = part.size(i);
      known.parts.emplace_back(type_of(part), sizes);
      known.bytes.push_back(part.element_size());
    }
    quantize_calls.keep(key, known);
  }
  return parts;
}

// Rows x [B, H, S, K] as codes behind the first `length` tokens of parts [B, H, capacity, *]. Gives whether it could.
bool append_to(const std::vector<Tensor>& parts, const Tensor& x, const std::string& spec, const Part& static_scale, int64_t length) {
  if (dtype_of(x) < 0 || x.dim() != 4 || !x.numel() || !x.is_contiguous()) return false;
  std::pair<std::string, Layout> key{spec, {}};
  key.second.reserve(24);
  look_at(x, key.second);
  look_at(static_scale, key.second);
  auto known = quantize_calls.find(key);
  if (!known || known->parts.size() != parts.size() || known->call.tokens != x.size(2)) return false;
  int64_t heads = x.size(0) * x.size(1), tokens = x.size(2);
  std::vector<std::vector<char>> codes(parts.size());
  void* slots[4] = {};
  for (size_t i = 0, slot = 0; i < parts.size(); i++, slot++) {
    const auto& [type, sizes] = known->parts[i];
    const Tensor& part = parts[i];
    bool fits = part.dim() == 4 && part.is_contiguous() && part.size(0) == x.size(0) && part.size(1) == x.size(1);
    fits = fits && length + tokens <= part.size(2) && sizes.size() == 4 && sizes[2] == tokens;
    if (!fits || part.element_size() != known->bytes[i] || part.size(3) != sizes[3]) return false;
    codes[i].resize(heads * tokens * sizes[3] * known->bytes[i]);
    while (!(known->call.slots >> slot & 1)) slot++;
    slots[slot] = codes[i].data();
  }
  const QuantizeCall& call = known->call;
  Frame frame = call.change.with(data(static_scale));
  if (call.kernel(call.stored.spec, slots[0], slots[1], slots[2], slots[3], call.n, call.k, call.stored.scale_rows, call.stored.outer_rows,
                  x.const_data_ptr(), call.tokens, dtype_of(x), &frame, int32_t(torch::stable::get_num_threads())))
    return false;
  for (size_t i = 0; i < parts.size(); i++) {
    int64_t row = parts[i].size(3) * known->bytes[i], capacity = parts[i].size(2);
    char* to = (char*)parts[i].mutable_data_ptr();
    for (int64_t h = 0; h < heads; h++) std::memcpy(to + (h * capacity + length) * row, codes[i].data() + h * tokens * row, tokens * row);
  }
  return true;
}

// The next tokens of a cache; see schemas.py.
Tensor append(std::vector<Tensor> k, std::vector<Tensor> v, Tensor length, const Tensor& keys, const Tensor& values, std::string k_spec,
              std::string v_spec, const Part& k_scale, const Part& v_scale) {
  if (length.scalar_type() != torch::headeronly::ScalarType::Long || length.numel() != 1 || *(const int64_t*)length.const_data_ptr() < 0)
    return in_python("qpass::append_checked", k, v, length, keys, values, k_spec, v_spec, k_scale, v_scale);
  int64_t* now = (int64_t*)length.mutable_data_ptr();
  int64_t before = *now, after = before + (keys.dim() == 4 ? keys.size(2) : 0);
  bool fits = !k.empty() && !v.empty() && k[0].dim() == 4 && after <= k[0].size(2) && v[0].dim() == 4 && after <= v[0].size(2);
  if (fits && append_to(k, keys, k_spec, k_scale, before) && append_to(v, values, v_spec, v_scale, before)) {
    Tensor start = empty({}, type_of(length));
    *(int64_t*)start.mutable_data_ptr() = before;
    *now = after;
    return start;
  }
  return in_python("qpass::append_checked", k, v, length, keys, values, k_spec, v_spec, k_scale, v_scale);
}

// Rotary embedding of x [B, H, S, D], whose rows are numbers side by side, by cos and sin [B or 1, 1, S, D].
Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  int64_t heads = x.size(1), tokens = x.size(2), width = x.size(3), half = width / 2;
  Tensor y = empty({x.size(0), heads, tokens, width}, type_of(x));
  const float *from = (const float*)x.const_data_ptr(), *c = (const float*)cos.const_data_ptr(), *s = (const float*)sin.const_data_ptr();
  float* to = (float*)y.mutable_data_ptr();
  for (int64_t row = 0; row < x.size(0) * heads * tokens; row++, to += width) {
    int64_t t = row % tokens, h = row / tokens % heads, b = row / tokens / heads;
    const float* in = from + b * x.stride(0) + h * x.stride(1) + t * x.stride(2);
    int64_t at = ((cos.size(0) > 1 ? b : 0) * tokens + t) * width;
    for (int64_t i = 0; i < half; i++) {
      to[i] = in[i] * c[at + i] - in[half + i] * s[at + i];
      to[half + i] = in[half + i] * c[at + half + i] + in[i] * s[at + half + i];
    }
  }
  return y;
}

Three append_rotated(std::vector<Tensor> k, std::vector<Tensor> v, Tensor length, const Tensor& queries, const Tensor& keys,
                     const Tensor& values, const Tensor& cos, const Tensor& sin, std::string k_spec, std::string v_spec,
                     const Part& k_scale, const Part& v_scale) {
  auto is_usual = [&](const Tensor& x) {
    bool rows = x.dim() == 4 && dtype_of(x) == 0 && x.numel() && x.stride(3) == 1 && x.size(3) % 2 == 0;
    for (const Tensor& t : {cos, sin}) {
      rows = rows && t.dim() == 4 && dtype_of(t) == 0 && t.is_contiguous() && (t.size(0) == 1 || t.size(0) == x.size(0));
      rows = rows && t.size(1) == 1 && t.size(2) == x.size(2) && t.size(3) == x.size(3) && t.size(0) == cos.size(0);
    }
    return rows;
  };
  if (!is_usual(queries) || !is_usual(keys))
    return in_python<Three>("qpass::append_rotated_checked", k, v, length, queries, keys, values, cos, sin, k_spec, v_spec, k_scale,
                            v_scale);
  Tensor q = rotated(queries, cos, sin), key = rotated(keys, cos, sin);
  return {append(k, v, length, key, values, k_spec, v_spec, k_scale, v_scale), q, key};
}

}  // namespace

extern "C" {

void qpass_remember_linear(void* kernel, const void* spec, int64_t scale_rows, int64_t outer_rows, int64_t most_rows, int32_t int8) {
  linear_answer = LinearCall{(LinearKernel)kernel, {spec, scale_rows, outer_rows}, most_rows, int8};
}

void qpass_remember_attention(void* kernel, const void* k_spec, int64_t k_scale_rows, int64_t k_outer_rows, const void* v_spec,
                              int64_t v_scale_rows, int64_t v_outer_rows, const float* k_rotation, const float* v_rotation, int64_t k_heads,
                              int64_t v_heads, int64_t k_capacity, int64_t v_capacity, int64_t most_queries) {
  attention_answer = AttentionCall{(AttentionKernel)kernel, {k_spec, k_scale_rows, k_outer_rows}, {v_spec, v_scale_rows, v_outer_rows},
                                   {k_rotation, k_heads}, {v_rotation, v_heads}, k_capacity, v_capacity, most_queries};
}

void qpass_remember_quantize(void* kernel, const void* spec, int64_t scale_rows, int64_t outer_rows, const float* rotation, int64_t heads,
                             int64_t n, int64_t k, int64_t tokens, int64_t slots) {
  quantize_answer = QuantizeCall{(QuantizeKernel)kernel, {spec, scale_rows, outer_rows}, {rotation, heads}, n, k, tokens, slots};
}

// Another instruction set or another way of computing from now on.
void qpass_forget() {
  linear_calls.forget();
  attention_calls.forget();
  quantize_calls.forget();
}
}

STABLE_TORCH_LIBRARY_IMPL(qpass, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linears", TORCH_BOX(&linears));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("append", TORCH_BOX(&append));
  m.impl("append_rotated", TORCH_BOX(&append_rotated));
}
