// A row whose calls kernels serve, for inputs of known layouts: the kernels' calls alone, in memory that is laid out before. Of
// row.h. A decode step of a small model makes two hundred calls; looking at tensors and making them takes a tenth of its time.

// What a tensor looks like.
struct Seen {
  int32_t type;
  int64_t element, bytes;
  std::vector<int64_t> sizes, strides;

  explicit Seen(const Tensor& x) : type(type_of(x)), element(x.element_size()), bytes(x.numel() * element) {
    for (int64_t i = 0; i < x.dim(); i++) sizes.push_back(x.size(i)), strides.push_back(x.stride(i));
  }
};

// A register that is a result, and where it lies.
struct Place {
  int64_t of, offset;  // of: a register that was given; -1: the arena; -2 - i: what the row gives, number i
  bool view;           // of another
  Seen like;
};

struct Planned {
  const Call* call;
  Run run;
  std::vector<int64_t> given, made;  // registers; -1: none
};

struct Plan {
  std::vector<int64_t> layout;
  int64_t at_generation;
  std::vector<Planned> calls;
  std::vector<Place> places;
  int64_t bytes;
};
constexpr size_t MOST_GIVEN = 64;
constexpr int64_t MOST_BYTES = 1 << 24;  // of an arena, which a thread keeps

// Types, sizes and strides of tensors.
void look_at_all(const std::vector<Part>& tensors, size_t count, std::vector<int64_t>& layout) {
  layout.clear();
  for (size_t i = 0; i < count; i++) {
    AtenTensorHandle handle = tensors[i]->get();
    int64_t dims, *sizes, *strides;
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dims));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    layout.push_back(dims), layout.push_back(type);
    layout.insert(layout.end(), sizes, sizes + dims), layout.insert(layout.end(), strides, strides + dims);
  }
}

// Registers of a call's tensors in the order of a Run's: of a linear, its spec and such left out.
std::vector<int64_t> registers_of(const Call& call) {
  std::vector<int64_t> found;
  for (const Argument& argument : call.arguments) {
    if (argument.kind == 't' || argument.kind == 'l') found.insert(found.end(), argument.numbers.begin(), argument.numbers.end());
    if (argument.kind == 'o') found.push_back(argument.numbers.empty() ? -1 : argument.numbers[0]);
  }
  return found;
}

// Memory of results that are needed at the same time does not overlap; else it is used again.
class Arena {
 public:
  int64_t bytes = 0;

  int64_t take(int64_t size) {
    auto found = free_.find(size);
    if (found != free_.end() && !found->second.empty()) {
      int64_t at = found->second.back();
      found->second.pop_back();
      return at;
    }
    bytes += size;
    return bytes - size;
  }
  void give_back(int64_t at, int64_t size) { free_[size].push_back(at); }

 private:
  std::map<int64_t, std::vector<int64_t>> free_;
};

// Of a row that has just run: `runs` of its calls, and its results. Nothing if Python served one of the calls, or if it is too
// large.
std::shared_ptr<const Plan> plan_of(const Row& row, const std::vector<Run>& runs, const std::vector<Seen>& seen, std::vector<int64_t> layout, int64_t at_generation) {
  auto plan = std::make_shared<Plan>(Plan{std::move(layout), at_generation, {}, {}, 0});
  std::vector<int64_t> owner(row.given + seen.size(), -1), last(owner), sizes(owner);
  int64_t next = row.given;
  for (size_t c = 0; c < row.calls.size(); c++) {  // who owns what memory, and who reads it last
    const Call& call = row.calls[c];
    bool view = call.what == Operator::VIEW || call.what == Operator::TYPED;
    for (int64_t number : registers_of(call))
      if (number >= row.given) last[owner[number]] = c;
    for (int64_t r = 0; r < call.results; r++, next++) {
      int64_t source = view ? call.arguments[0].numbers[0] : next;
      owner[next] = source >= row.given && source != next ? owner[source] : source;
      if (owner[next] == next) last[next] = c;
      sizes[next] = (seen[next - row.given].bytes + 63) / 64 * 64;
    }
  }
  Arena arena;
  next = row.given;
  for (size_t c = 0; c < row.calls.size(); c++) {
    const Call& call = row.calls[c];
    bool view = call.what == Operator::VIEW || call.what == Operator::TYPED;
    if (!view && !runs[c]) return nullptr;
    Planned planned{&call, runs[c], registers_of(call), {}};
    if (planned.given.size() > MOST_GIVEN) return nullptr;
    for (int64_t r = 0; r < call.results; r++, next++) {
      planned.made.push_back(next);
      const Seen& like = seen[next - row.given];
      auto given = std::find(row.gives.begin(), row.gives.end(), next);
      Place place{-1, 0, view, like};
      if (view) {
        if (given != row.gives.end()) return nullptr;
        if (call.what == Operator::VIEW) place.offset = call.arguments[3].numbers[0] * like.element;
        int64_t number = owner[next] - row.given;
        place.of = number < 0 ? owner[next] : plan->places[number].of;
        if (number >= 0) place.offset += plan->places[number].offset;
      } else if (given != row.gives.end()) {
        place.of = -2 - (given - row.gives.begin());
      } else {
        place.offset = arena.take(sizes[next]);
      }
      plan->places.push_back(place);
    }
    for (int64_t number = row.given; number < next; number++)
      if (owner[number] == number && last[number] == int64_t(c) && plan->places[number - row.given].of == -1)
        arena.give_back(plan->places[number - row.given].offset, sizes[number]);
    if (!view) plan->calls.push_back(std::move(planned));
  }
  plan->bytes = arena.bytes;
  bool all = std::all_of(row.gives.begin(), row.gives.end(), [&](int64_t number) { return number >= row.given; });
  return all && plan->bytes <= MOST_BYTES ? plan : nullptr;
}

// `registers`: without those of the bundle. Fills those that the row gives; or, if a kernel could not do a call, those of all results before it. Gives how many
// calls were done. The tensors in registers that are not given lie in memory of this thread that is used again.
size_t run_plan(const Plan& plan, const Row& row, const std::vector<Part>& bundled, std::vector<Part>& registers) {
  static thread_local std::unique_ptr<char[]> arena;
  static thread_local int64_t size = 0;
  static thread_local std::vector<void*> memory;
  if (size < plan.bytes + 64) arena.reset(new char[plan.bytes + 64]), size = plan.bytes + 64;
  char* base = (char*)((uintptr_t(arena.get()) + 63) / 64 * 64);
  int64_t before = bundled.size();  // registers that come before the first of these
  registers.resize(row.given - before + plan.places.size());
  memory.clear();
  for (const Part& part : bundled) memory.push_back(data(part));
  for (int64_t i = before; i < row.given; i++) memory.push_back(i < row.inputs ? data(registers[i - before]) : own(*registers[i - before]));
  for (const Place& place : plan.places) {
    if (place.of < -1 && !place.view) registers[memory.size() - before] = empty(place.like.sizes, place.like.type);
    char* of = place.of >= 0 ? (char*)memory[place.of] : place.of == -1 ? base : (char*)data(registers[row.gives[-2 - place.of] - before]);
    memory.push_back(of + place.offset);
  }
  void *given[MOST_GIVEN], *made[4];
  for (const Planned& call : plan.calls) {
    for (size_t i = 0; i < call.given.size(); i++) given[i] = call.given[i] < 0 ? nullptr : memory[call.given[i]];
    for (size_t i = 0; i < call.made.size(); i++) made[i] = memory[call.made[i]];
    if (call.run(given, made)) continue;
    for (size_t i = row.given; i < memory.size(); i++) {
      const Place& place = plan.places[i - row.given];
      if (place.of < -1 && !place.view) continue;
      AtenTensorHandle x;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(memory[i], place.like.sizes.size(), place.like.sizes.data(), place.like.strides.data(), 0, place.like.type,
                                                                       aoti_torch_device_type_cpu(), 0, &x));
      registers[i - before] = Tensor(x);
    }
    return call.call - row.calls.data();
  }
  return row.calls.size();
}
