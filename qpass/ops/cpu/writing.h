// torch.ops.qpass.append, append_residual, append_rotated and write_rotated: the next tokens of a cache. Of binding.cpp.

// Rows of keys, or of values, as codes behind the tokens of a cache that are there.
struct Half {
  QuantizeCall call;
  int32_t dtype;
  int64_t heads, tokens;
  std::vector<int64_t> bytes, capacities;  // of each part: of a row of it, and rows

  bool has_room(int64_t length) const {
    for (int64_t capacity : capacities)
      if (length < 0 || length + tokens > capacity) return false;
    return true;
  }
  bool write(void* const* parts, const void* x, const void* scale, int64_t length) const {
    static thread_local std::vector<char> codes;
    int64_t total = 0;
    for (int64_t row : bytes) total += heads * tokens * row + 64;
    if (int64_t(codes.size()) < total) codes.resize(total);
    void* slots[4] = {};
    char* free = codes.data();
    for (size_t i = 0, slot = 0; i < bytes.size(); i++, slot++) {
      while (!(call.slots >> slot & 1)) slot++;
      slots[slot] = free;
      free += (heads * tokens * bytes[i] + 63) / 64 * 64;
    }
    Frame frame = call.change.with(scale);
    if (call.kernel(call.stored.spec, slots[0], slots[1], slots[2], slots[3], call.n, call.k, call.stored.scale_rows, call.stored.outer_rows, x, call.tokens,
                    dtype, &frame, int32_t(torch::stable::get_num_threads())))
      return false;
    for (size_t i = 0, slot = 0; i < bytes.size(); i++, slot++) {
      while (!(call.slots >> slot & 1)) slot++;
      for (int64_t h = 0; h < heads; h++)
        std::memcpy((char*)parts[i] + (h * capacities[i] + length) * bytes[i], (char*)slots[slot] + h * tokens * bytes[i], tokens * bytes[i]);
    }
    return true;
  }
};

// For x [B, H, S, K] in order, if a kernel has served such rows before.
std::optional<Half> half_of(const std::vector<Tensor>& parts, const Tensor& x, const std::string& spec, const Part& static_scale) {
  if (dtype_of(x) < 0 || x.dim() != 4 || !x.numel()) return std::nullopt;
  std::pair<std::string, Layout> key{spec, {}};
  key.second.reserve(24);
  look_at_in_order(x, key.second);
  look_at(static_scale, key.second);
  auto known = quantize_calls.find(key);
  if (!known || known->parts.size() != parts.size() || known->call.tokens != x.size(2)) return std::nullopt;
  Half half{known->call, dtype_of(x), x.size(0) * x.size(1), x.size(2), {}, {}};
  for (size_t i = 0; i < parts.size(); i++) {
    const auto& [type, sizes] = known->parts[i];
    const Tensor& part = parts[i];
    bool fits = part.dim() == 4 && part.is_contiguous() && part.size(0) == x.size(0) && part.size(1) == x.size(1);
    fits = fits && sizes.size() == 4 && sizes[2] == half.tokens && part.element_size() == known->bytes[i] && part.size(3) == sizes[3];
    if (!fits) return std::nullopt;
    half.bytes.push_back(sizes[3] * known->bytes[i]);
    half.capacities.push_back(part.size(2));
  }
  return half;
}

// Both halves of a cache, and how many tokens are there.
struct Writer {
  Half k, v;

  // `parts`: of k, then of v. Gives whether it could: there is room, and all numbers are finite.
  bool write(void* const* parts, const void* keys, const void* values, const void* k_scale, const void* v_scale, int64_t* length, int64_t* before) const {
    int64_t now = *length;
    if (!k.has_room(now) || !v.has_room(now)) return false;
    if (!k.write(parts, keys, k_scale, now) || !v.write(parts + k.bytes.size(), values, v_scale, now)) return false;
    *before = now;
    *length = now + k.tokens;
    return true;
  }
};

std::optional<Writer> writer_of(const std::vector<Tensor>& k, const std::vector<Tensor>& v, const Tensor& length, const Tensor& keys, const Tensor& values,
                                const std::string& k_spec, const std::string& v_spec, const Part& k_scale, const Part& v_scale) {
  if (length.scalar_type() != torch::headeronly::ScalarType::Long || length.numel() != 1) return std::nullopt;
  auto k_half = half_of(k, keys, k_spec, k_scale), v_half = half_of(v, values, v_spec, v_scale);
  if (!k_half || !v_half || k_half->tokens != v_half->tokens) return std::nullopt;
  return Writer{*k_half, *v_half};
}

// The memory of parts, and of what follows them.
std::vector<void*> flat(const std::vector<Tensor>& k, const std::vector<Tensor>& v, std::initializer_list<void*> rest) {
  std::vector<void*> all;
  for (auto* parts : {&k, &v})
    for (const Tensor& part : *parts) all.push_back(own(part));
  all.insert(all.end(), rest);
  return all;
}

// The next tokens of a cache; see schemas.py.
Tensor append(std::vector<Tensor> k, std::vector<Tensor> v, Tensor length, const Tensor& keys, const Tensor& values, std::string k_spec,
              std::string v_spec, const Part& k_scale, const Part& v_scale) {
  auto writer = keys.is_contiguous() && values.is_contiguous() ? writer_of(k, v, length, keys, values, k_spec, v_spec, k_scale, v_scale) : std::nullopt;
  if (writer) {
    Tensor before = empty({}, type_of(length));
    auto run = [writer = *writer, parts = k.size() + v.size()](void* const* given, void* const* made) {
      void* const* a = given + parts;
      return writer.write(given, a[1], a[2], a[3], a[4], (int64_t*)a[0], (int64_t*)made[0]);
    };
    if (wanted_run) *wanted_run = run;
    void* made = before.mutable_data_ptr();
    if (run(flat(k, v, {own(length), data(keys), data(values), data(k_scale), data(v_scale)}).data(), &made)) return before;
  }
  return in_python("qpass::append_checked", k, v, length, keys, values, k_spec, v_spec, k_scale, v_scale);
}

// One token behind those of a cache whose last ones are floats (residual.py), where none leaves them. `floats`: of keys or values.
struct Window {
  int64_t heads_of_all, heads, tokens, bytes, strides[2];  // of a row, and from one head to the next

  static constexpr int64_t BLOCK = 32;
  static int64_t quantized_before(int64_t length, int64_t window) { return std::max<int64_t>(length - window, 0) / BLOCK * BLOCK; }

  Window(const Tensor& floats, const Tensor& x)
      : heads_of_all(x.size(0) * x.size(1)), heads(x.size(1)), tokens(floats.size(2)), bytes(x.size(3) * x.element_size()) {
    for (int i = 0; i < 2; i++) strides[i] = x.stride(i) * x.element_size();
  }
  static bool serves(const Tensor& floats, const Tensor& x) {
    bool rows = x.dim() == 4 && x.size(2) == 1 && x.stride(3) == 1 && floats.dim() == 4 && floats.is_contiguous();
    for (int i : {0, 1, 3}) rows = rows && floats.size(i) == x.size(i);
    return rows && floats.scalar_type() == x.scalar_type() && floats.size(2) > BLOCK;
  }
  void write(void* floats, const void* x, int64_t place) const {
    for (int64_t head = 0; head < heads_of_all; head++)
      std::memcpy((char*)floats + (head * tokens + place) * bytes, (const char*)x + head / heads * strides[0] + head % heads * strides[1], bytes);
  }
};

Tensor append_residual(std::vector<Tensor> k, std::vector<Tensor> v, std::vector<Tensor> floats, Tensor length, const Tensor& keys,
                       const Tensor& values, std::string k_spec, std::string v_spec, const Part& k_scale, const Part& v_scale) {
  bool usual = floats.size() == 4 && length.scalar_type() == torch::headeronly::ScalarType::Long && length.numel() == 1 &&
               Window::serves(floats[0], keys) && Window::serves(floats[1], values) && floats[0].size(2) == floats[1].size(2);
  if (usual) {
    Tensor start = empty({}, type_of(length));
    auto run = [of_k = Window(floats[0], keys), of_v = Window(floats[1], values), firsts = floats[2].size(2), capacity = k[0].size(2)](
                   void* const* a, void* const* made) {
      int64_t &now = *(int64_t*)a[2], window = of_k.tokens - Window::BLOCK, from = Window::quantized_before(now, window);
      if (now < firsts || now >= capacity || Window::quantized_before(now + 1, window) > from) return false;
      of_k.write(a[0], a[3], now - from), of_v.write(a[1], a[4], now - from);
      now++;
      *(int64_t*)made[0] = from;
      return true;
    };
    void* given[] = {own(floats[0]), own(floats[1]), own(length), data(keys), data(values)};
    void* made = start.mutable_data_ptr();
    if (run(given, &made)) return start;
  }
  return in_python("qpass::append_residual_checked", k, v, floats, length, keys, values, k_spec, v_spec, k_scale, v_scale);
}

// Rotary embedding of x [B, H, S, D], whose rows are numbers side by side, by cos and sin [B or 1, 1, S, D].
struct Rotation {
  int64_t batch, heads, tokens, width, strides[3];
  bool own_angles;  // of each sequence
  int32_t dtype;

  int64_t row_bytes() const { return width * (dtype == 0 ? 4 : 2); }

  // Head h of all of them and token t to place(h, t).
  template <class Place> void operator()(const void* x, const void* cos, const void* sin, Place&& place) const {
    if (dtype == 0) of<float>(x, cos, sin, place);
    else of<uint16_t>(x, cos, sin, place);
  }
  void in_order(const void* x, const void* cos, const void* sin, void* y) const {
    (*this)(x, cos, sin, [&](int64_t head, int64_t t) { return (char*)y + (head * tokens + t) * row_bytes(); });
  }

 private:
  template <class T, class Place> void of(const void* x, const void* cos, const void* sin, Place&& place) const {
    const T *from = (const T*)x, *c = (const T*)cos, *s = (const T*)sin;
    int64_t half = width / 2;
    for (int64_t row = 0; row < batch * heads * tokens; row++) {
      int64_t t = row % tokens, h = row / tokens % heads, b = row / tokens / heads, at = ((own_angles ? b : 0) * tokens + t) * width;
      const T* in = from + b * strides[0] + h * strides[1] + t * strides[2];
      T* to = (T*)place(row / tokens, t);
      for (int64_t i = 0; i < half; i++) {
        float low = as_float(in[i]), high = as_float(in[half + i]);
        to[i] = from_float<T>(low * as_float(c[at + i]) - high * as_float(s[at + i]));
        to[half + i] = from_float<T>(high * as_float(c[at + half + i]) + low * as_float(s[at + half + i]));
      }
    }
  }
};

std::optional<Rotation> rotation_of(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  bool rows = x.dim() == 4 && is_computed(x) && x.numel() && x.stride(3) == 1 && x.size(3) % 2 == 0;
  for (const Tensor& t : {cos, sin}) {
    rows = rows && t.dim() == 4 && dtype_of(t) == dtype_of(x) && t.is_contiguous() && (t.size(0) == 1 || t.size(0) == x.size(0));
    rows = rows && t.size(1) == 1 && t.size(2) == x.size(2) && t.size(3) == x.size(3) && t.size(0) == cos.size(0);
  }
  if (!rows) return std::nullopt;
  return Rotation{x.size(0), x.size(1), x.size(2), x.size(3), {x.stride(0), x.stride(1), x.stride(2)}, cos.size(0) > 1, dtype_of(x)};
}

// The same after rotary embedding of queries and keys.
Three append_rotated(std::vector<Tensor> k, std::vector<Tensor> v, Tensor length, const Tensor& queries, const Tensor& keys,
                     const Tensor& values, const Tensor& cos, const Tensor& sin, std::string k_spec, std::string v_spec,
                     const Part& k_scale, const Part& v_scale) {
  auto of_q = rotation_of(queries, cos, sin), of_k = rotation_of(keys, cos, sin);
  auto writer = of_q && of_k && Gather::serves(values) ? writer_of(k, v, length, keys, values, k_spec, v_spec, k_scale, v_scale) : std::nullopt;
  if (writer) {
    auto like = [](const Tensor& x) { return empty({x.size(0), x.size(1), x.size(2), x.size(3)}, type_of(x)); };
    Tensor before = empty({}, type_of(length)), q = like(queries), key = like(keys);
    auto run = [of_q = *of_q, of_k = *of_k, gather = Gather(values, 0), writer = *writer, parts = k.size() + v.size()](void* const* given, void* const* made) {
      void* const* a = given + parts;
      of_q.in_order(a[1], a[4], a[5], made[1]), of_k.in_order(a[2], a[4], a[5], made[2]);
      return writer.write(given, made[2], gather(a[3]), a[6], a[7], (int64_t*)a[0], (int64_t*)made[0]);
    };
    if (wanted_run) *wanted_run = run;
    void* made[] = {before.mutable_data_ptr(), q.mutable_data_ptr(), key.mutable_data_ptr()};
    auto given = flat(k, v, {own(length), data(queries), data(keys), data(values), data(cos), data(sin), data(k_scale), data(v_scale)});
    if (run(given.data(), made)) return {before, q, key};
  }
  return in_python<Three>("qpass::append_rotated_checked", k, v, length, queries, keys, values, cos, sin, k_spec, v_spec, k_scale, v_scale);
}

// Rotated keys, and values, to their positions in caches of floats [B, H, capacity, D].
Tensor write_rotated(Tensor k, Tensor v, const Tensor& positions, const Tensor& queries, const Tensor& keys, const Tensor& values,
                     const Tensor& cos, const Tensor& sin) {
  auto holds = [&](const Tensor& cache, const Tensor& x) {
    bool rows = x.dim() == 4 && x.stride(3) == 1 && cache.dim() == 4 && cache.is_contiguous();
    rows = rows && dtype_of(x) == dtype_of(queries) && dtype_of(cache) == dtype_of(queries);
    for (int i : {0, 1, 3}) rows = rows && cache.size(i) == x.size(i);
    return rows && x.size(2) == keys.size(2);
  };
  auto of_q = rotation_of(queries, cos, sin), of_k = rotation_of(keys, cos, sin);
  bool usual = of_q && of_k && holds(k, keys) && holds(v, values) && keys.size(0) == values.size(0) && positions.scalar_type() == torch::headeronly::ScalarType::Long;
  if (usual && positions.is_contiguous() && positions.numel() == keys.size(2)) {
    Tensor y = empty({queries.size(0), queries.size(1), queries.size(2), queries.size(3)}, type_of(queries));
    int64_t size = values.element_size();
    auto run = [of_q = *of_q, of_k = *of_k, v_heads = v.size(1), v_bytes = v.size(3) * size, k_rows = k.size(2), v_rows = v.size(2),
                strides = std::vector<int64_t>{values.stride(0) * size, values.stride(1) * size, values.stride(2) * size}](void* const* a, void* const* made) {
      const int64_t* at = (const int64_t*)a[2];
      for (int64_t t = 0; t < of_k.tokens; t++)
        if (at[t] < 0 || at[t] >= k_rows || at[t] >= v_rows) return false;
      of_k(a[4], a[6], a[7], [&](int64_t head, int64_t t) { return (char*)a[0] + (head * k_rows + at[t]) * of_k.row_bytes(); });
      for (int64_t head = 0; head < of_k.batch * v_heads; head++)
        for (int64_t t = 0; t < of_k.tokens; t++) {
          const char* row = (const char*)a[5] + head / v_heads * strides[0] + head % v_heads * strides[1] + t * strides[2];
          std::memcpy((char*)a[1] + (head * v_rows + at[t]) * v_bytes, row, v_bytes);
        }
      of_q.in_order(a[3], a[6], a[7], made[0]);
      return true;
    };
    if (serve(run, {own(k), own(v), data(positions), data(queries), data(keys), data(values), data(cos), data(sin)}, {y.mutable_data_ptr()})) return y;
  }
  return in_python("qpass::write_rotated_checked", k, v, positions, queries, keys, values, cos, sin);
}
