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
      Tensor y = empty(sizes, type_of(x));
      auto run = [call = *call, n, k, count, dtype, bias_dtype, eps, norm_dtype = norm ? dtype_of(*norm) : 0, gate = gate_of(gate)](
                     void* const* a, void* const* made) {
        Around around{a[6], (const float*)a[7], a[8], float(eps.value_or(0)), eps.has_value(), norm_dtype, gate};
        call.kernel(call.weight.spec, a[1], a[2], a[3], a[4], n, k, call.weight.scale_rows, call.weight.outer_rows, a[0], a[5], made[0], count, dtype,
                    bias_dtype, call.int8, &around, int32_t(torch::stable::get_num_threads()));
        return true;
      };
      serve(run, {data(x), data(w), data(scale), data(zero), data(outer), data(bias), data(norm), data(columns), data(residual)}, {y.mutable_data_ptr()});
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
  bool usual = q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && is_computed(q) && q.is_contiguous() && q.numel();
  std::optional<std::vector<int64_t>> strides(std::vector<int64_t>(4, 0));
  int32_t mask_type = 0;  // enum MaskType of attention.h
  if (usual && mask) {
    mask_type = mask->scalar_type() == ScalarType::Bool ? 1 : 2;
    usual = mask_type == 1 || mask->scalar_type() == ScalarType::Float;
    strides = strides_of(*mask, {q.size(0), q.size(1), q.size(2), k.size(2)});
    usual = usual && strides;
  }
  int32_t dtype = dtype_of(q);
  usual = usual && (!sinks || (sinks->scalar_type() == ScalarType::Float && sinks->is_contiguous()));
  for (const Part& part : {k_first, v_first}) usual = usual && (!part || (dtype_of(*part) == dtype && part->is_contiguous()));
  for (const Part& part : {k_last, v_last}) usual = usual && (!part || (dtype_of(*part) == dtype && Gather::serves(*part)));
  std::pair<std::string, Layout> key;
  if (usual) {
    key.first = k_spec + "," + v_spec;
    key.second.reserve(64);
    for (int64_t size : {q.size(0), q.size(1), q.size(3), v_columns}) key.second.push_back(size);
    for (const Part& part : {Part(k), k_scale, k_zero, k_outer, Part(v), v_scale, v_zero, v_outer}) look_at(part, key.second);
    if (auto call = attention_calls.find(key); call && q.size(2) <= call->most_queries) {
      Tensor y = empty({q.size(0), q.size(1), q.size(2), v_columns}, type_of(q));
      auto run = [call = *call, batch = q.size(0), q_heads = q.size(1), queries = q.size(2), width = q.size(3), k_heads = k.size(1), tokens = k.size(2),
                  dtype, v_columns, at = *strides, mask_type, causal, factor = scale ? float(*scale) : 1.0f / std::sqrt(float(q.size(3))),
                  of_k_last = k_last ? std::optional(Gather(*k_last, 0)) : std::nullopt, of_v_last = v_last ? std::optional(Gather(*v_last, 1)) : std::nullopt,
                  firsts = k_first ? k_first->size(2) : 0, lasts = k_last ? k_last->size(2) : 0, cap = float(soft_cap)](
                     void* const* a, void* const* made) {
        auto floats = [&](int i) { return (const float*)a[i]; };
        const Change &kc = call.k_change, &vc = call.v_change;
        int64_t sizes[] = {batch, q_heads, k_heads, queries, tokens, call.k_capacity, call.v_capacity, at[0], at[1], at[2], at[3]};
        auto first = [&](int i, int64_t columns, int slot) { return in_float(a[i], batch * k_heads * firsts * columns, dtype, slot); };
        auto last = [&](const std::optional<Gather>& gather, const void* x, int slot) {
          return gather ? in_float((*gather)(x), gather->count(dtype ? 2 : 4), dtype, slot) : nullptr;
        };
        const float* query = in_float(a[0], batch * q_heads * queries * width, dtype, 0);
        Extras more{first(10, width, 1), first(11, v_columns, 2), last(of_k_last, a[12], 3), last(of_v_last, a[13], 4), floats(15), firsts, lasts, a[14] ? *(const int64_t*)a[14] : 0, cap, kc.with(a[2]), vc.with(a[6])};
        const Stored &ks = call.keys, &vs = call.values;
        call.kernel(ks.spec, a[1], kc.heads ? nullptr : a[2], a[3], a[4], batch * k_heads * call.k_capacity, width, ks.scale_rows, ks.outer_rows, vs.spec,
                    a[5], vc.heads ? nullptr : a[6], a[7], a[8], batch * k_heads * call.v_capacity, v_columns, vs.scale_rows, vs.outer_rows, query, a[9],
                    sizes, mask_type, causal, factor, made[0], dtype, &more, int32_t(torch::stable::get_num_threads()));
        return true;
      };
      serve(run,
            {data(q), data(k), data(k_scale), data(k_zero), data(k_outer), data(v), data(v_scale), data(v_zero), data(v_outer), data(mask), data(k_first),
             data(v_first), data(k_last), data(v_last), data(start), data(sinks)},
            {y.mutable_data_ptr()});
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
    look_at_in_order(x, key.second);
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

#include "writing.h"
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

int64_t qpass_planned_rows() { return planned_rows; }

// The first of these numbers in memory, from number `start` on, that is not what was seen; -1 if there is none.
int64_t qpass_first_other(const uint64_t* const* places, const uint64_t* seen, int64_t start, int64_t count) {
  for (int64_t i = start; i < count; i++)
    if (*places[i] != seen[i]) return i;
  return -1;
}

uint64_t qpass_layouts(int64_t number) { return layouts_of(*unbundle(number)); }

// A bundle is gone (bundle.py).
void qpass_let_go(int64_t number) {
  Bundle last;  // is let go of without the lock
  std::unique_lock lock(bundles_mutex);
  auto found = bundles.find(number);
  if (found != bundles.end()) last = std::move(found->second), bundles.erase(found);
}

// Another instruction set or another way of computing from now on.
void qpass_forget() {
  linear_calls.forget();
  attention_calls.forget();
  quantize_calls.forget();
  generation++;
}
}

STABLE_TORCH_LIBRARY_IMPL(qpass, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("row", TORCH_BOX(&row));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("append", TORCH_BOX(&append));
  m.impl("append_residual", TORCH_BOX(&append_residual));
  m.impl("append_rotated", TORCH_BOX(&append_rotated));
  m.impl("write_rotated", TORCH_BOX(&write_rotated));
}
