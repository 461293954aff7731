// torch.ops.qpass on CPU tensors without Python, on torch's stable ABI: the same call takes a few microseconds instead of
// twenty-five to eighty.
//
// Only calls like one that Python (operators.py) has checked before are served here. "Like": everything that it looks at is
// equal, which is types and layouts of the stored parts, the spec, and the inputs' columns. Others go to Python, as `linear_checked`
// and the like; if it finds that a kernel can serve them, it says with what (qpass_remember_..) and that is kept.
#include "binding.h"

#include <cmath>
#include <cstring>

namespace {

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

// Whether rows of x [B, H, S, D] are float numbers side by side, which cos and sin [B or 1, 1, S, D] can rotate.
bool can_rotate(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  bool rows = x.dim() == 4 && dtype_of(x) == 0 && x.numel() && x.stride(3) == 1 && x.size(3) % 2 == 0;
  for (const Tensor& t : {cos, sin}) {
    rows = rows && t.dim() == 4 && dtype_of(t) == 0 && t.is_contiguous() && (t.size(0) == 1 || t.size(0) == x.size(0));
    rows = rows && t.size(1) == 1 && t.size(2) == x.size(2) && t.size(3) == x.size(3) && t.size(0) == cos.size(0);
  }
  return rows;
}

// Rotary embedding of x [B, H, S, D] by cos and sin, of head h of all of them and token t to place(h, t).
template <class Place> void rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, Place&& place) {
  int64_t heads = x.size(1), tokens = x.size(2), width = x.size(3), half = width / 2;
  const float *from = (const float*)x.const_data_ptr(), *c = (const float*)cos.const_data_ptr(), *s = (const float*)sin.const_data_ptr();
  for (int64_t row = 0; row < x.size(0) * heads * tokens; row++) {
    int64_t t = row % tokens, h = row / tokens % heads, b = row / tokens / heads;
    const float* in = from + b * x.stride(0) + h * x.stride(1) + t * x.stride(2);
    int64_t at = ((cos.size(0) > 1 ? b : 0) * tokens + t) * width;
    float* to = place(row / tokens, t);
    for (int64_t i = 0; i < half; i++) {
      to[i] = in[i] * c[at + i] - in[half + i] * s[at + i];
      to[half + i] = in[half + i] * c[at + half + i] + in[i] * s[at + half + i];
    }
  }
}

Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  Tensor y = empty({x.size(0), x.size(1), x.size(2), x.size(3)}, type_of(x));
  float* to = (float*)y.mutable_data_ptr();
  rotate(x, cos, sin, [&](int64_t head, int64_t t) { return to + (head * x.size(2) + t) * x.size(3); });
  return y;
}

Three append_rotated(std::vector<Tensor> k, std::vector<Tensor> v, Tensor length, const Tensor& queries, const Tensor& keys,
                     const Tensor& values, const Tensor& cos, const Tensor& sin, std::string k_spec, std::string v_spec,
                     const Part& k_scale, const Part& v_scale) {
  if (!can_rotate(queries, cos, sin) || !can_rotate(keys, cos, sin))
    return in_python<Three>("qpass::append_rotated_checked", k, v, length, queries, keys, values, cos, sin, k_spec, v_spec, k_scale,
                            v_scale);
  Tensor q = rotated(queries, cos, sin), key = rotated(keys, cos, sin);
  return {append(k, v, length, key, values, k_spec, v_spec, k_scale, v_scale), q, key};
}

// Rotated keys, and values, to their positions in caches of floats [B, H, capacity, D].
Tensor write_rotated(Tensor k, Tensor v, const Tensor& positions, const Tensor& queries, const Tensor& keys, const Tensor& values,
                     const Tensor& cos, const Tensor& sin) {
  auto holds = [&](const Tensor& cache, const Tensor& x) {
    bool rows = x.dim() == 4 && dtype_of(x) == 0 && x.stride(3) == 1 && cache.dim() == 4 && dtype_of(cache) == 0 && cache.is_contiguous();
    for (int i : {0, 1, 3}) rows = rows && cache.size(i) == x.size(i);
    return rows && x.size(2) == keys.size(2);
  };
  bool usual = can_rotate(queries, cos, sin) && can_rotate(keys, cos, sin) && holds(k, keys) && holds(v, values);
  int64_t tokens = usual ? keys.size(2) : 0;
  usual = usual && positions.scalar_type() == torch::headeronly::ScalarType::Long && positions.is_contiguous() && positions.numel() == tokens;
  const int64_t* at = (const int64_t*)positions.const_data_ptr();
  for (int64_t t = 0; usual && t < tokens; t++) usual = at[t] >= 0 && at[t] < k.size(2) && at[t] < v.size(2);
  if (!usual) return in_python("qpass::write_rotated_checked", k, v, positions, queries, keys, values, cos, sin);
  float *k_rows = (float*)k.mutable_data_ptr(), *v_rows = (float*)v.mutable_data_ptr();
  rotate(keys, cos, sin, [&](int64_t head, int64_t t) { return k_rows + (head * k.size(2) + at[t]) * k.size(3); });
  const float* from = (const float*)values.const_data_ptr();
  for (int64_t head = 0; head < v.size(0) * v.size(1); head++)
    for (int64_t t = 0; t < tokens; t++) {
      int64_t b = head / v.size(1), h = head % v.size(1);
      const float* row = from + b * values.stride(0) + h * values.stride(1) + t * values.stride(2);
      std::memcpy(v_rows + (head * v.size(2) + at[t]) * v.size(3), row, v.size(3) * sizeof(float));
    }
  return rotated(queries, cos, sin);
}

#include "row.h"

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
  m.impl("row", TORCH_BOX(&row));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("append", TORCH_BOX(&append));
  m.impl("append_rotated", TORCH_BOX(&append_rotated));
  m.impl("write_rotated", TORCH_BOX(&write_rotated));
}
