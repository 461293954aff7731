// torch.ops.qpass.row: calls of the operators, one after another. Of binding.cpp, whose functions it calls.

enum class Operator { VIEW, TYPED, LINEAR, ATTENTION, APPEND, APPEND_ROTATED, WRITE_ROTATED };

// Name, number of results and the arguments of a call: t a tensor, o one or none, l a list of them, s text, f a number or none,
// i integers.
struct Known {
  const char* name;
  Operator what;
  int64_t results;
  const char* arguments;
};
constexpr Known KNOWN[] = {
    {"view", Operator::VIEW, 1, "tiii"},
    {"typed", Operator::TYPED, 1, "ts"},
    {"linear", Operator::LINEAR, 1, "ttoooosofoso"},
    {"attention", Operator::ATTENTION, 1, "ttooostoooisoifooooofo"},
    {"append", Operator::APPEND, 1, "lltttssoo"},
    {"append_rotated", Operator::APPEND_ROTATED, 3, "llttttttssoo"},
    {"write_rotated", Operator::WRITE_ROTATED, 1, "tttttttt"},
};

struct Argument {
  char kind;
  std::vector<int64_t> numbers;  // registers, or integers
  std::string text;
  std::optional<double> value;
};

// See Call of row.py. `dead`: the registers that no later call reads.
struct Call {
  Operator what;
  int64_t results;
  std::vector<Argument> arguments;
  std::vector<int64_t> dead;
};
struct Plan;
struct Row {
  std::vector<Call> calls;
  std::vector<int64_t> gives;
  int64_t inputs, given;  // registers of inputs; and of what is written to, behind them
  mutable std::mutex mutex;
  mutable std::vector<std::shared_ptr<const Plan>> plans;  // of the inputs' layouts at the last calls that made one
  mutable int64_t tries = 0, tried_at = 0;                 // in vain, one after another, and at which generation
};

std::vector<std::string> cut(const std::string& text, char at) {
  std::vector<std::string> pieces(1);
  for (char c : text)
    if (c == at) pieces.emplace_back();
    else pieces.back() += c;
  return pieces;
}

std::vector<int64_t> integers(const std::string& text) {
  std::vector<int64_t> found;
  if (!text.empty())
    for (const std::string& number : cut(text, ',')) found.push_back(std::stoll(number));
  return found;
}

Argument read_argument(char kind, const std::string& text) {
  Argument argument{kind, {}, {}, {}};
  if (kind == 's') argument.text = text;
  else if (kind != 'f') argument.numbers = integers(text);
  else if (!text.empty()) {  // as C writes numbers, whatever the user's locale
    std::istringstream number(text);
    number.imbue(std::locale::classic());
    number >> argument.value.emplace();
  }
  return argument;
}

// Of text that row.py wrote and checked, when the graph was made. `inputs`: those of the bundle, and the others.
std::shared_ptr<const Row> read_row(const std::string& text, int64_t inputs, int64_t written) {
  int64_t given = inputs + written;
  auto row = std::make_shared<Row>();
  auto parts = cut(text, '|');
  if (parts[0].rfind("holds;", 0) == 0) parts.erase(parts.begin());
  int64_t free = given;
  std::map<int64_t, size_t> last_reader;
  for (size_t i = 0; i + 1 < parts.size(); i++) {
    auto fields = cut(parts[i], ';');
    const Known* known = nullptr;
    for (const Known& each : KNOWN)
      if (fields[0] == each.name) known = &each;
    STD_TORCH_CHECK(known && fields.size() == std::strlen(known->arguments) + 1, "qpass::row: no such call: ", parts[i]);
    Call call{known->what, known->results, {}, {}};
    for (size_t a = 1; a < fields.size(); a++) {
      char kind = known->arguments[a - 1];
      call.arguments.push_back(read_argument(kind, fields[a]));
      STD_TORCH_CHECK(kind != 't' || call.arguments.back().numbers.size() == 1, "qpass::row: not one tensor: ", parts[i]);
      if (kind != 't' && kind != 'o' && kind != 'l') continue;
      for (int64_t number : call.arguments.back().numbers) {
        STD_TORCH_CHECK(number >= 0 && number < free, "qpass::row: a tensor that there is not yet: ", parts[i]);
        if (number >= given) last_reader[number] = i;
      }
    }
    free += known->results;
    row->calls.push_back(call);
  }
  auto gives = cut(parts.back(), ';');
  for (size_t i = 1; i < gives.size(); i++) row->gives.push_back(std::stoll(gives[i]));
  STD_TORCH_CHECK(row->gives.size() == 1 || row->gives.size() == 2, "qpass::row: gives one or two results: ", text);
  for (int64_t number : row->gives) {
    STD_TORCH_CHECK(number >= 0 && number < free, "qpass::row: gives what there is not: ", text);
    last_reader.erase(number);
  }
  for (auto [number, reader] : last_reader) row->calls[reader].dead.push_back(number);
  row->inputs = inputs, row->given = given;
  return row;
}

Memory<std::shared_ptr<const Row>> known_rows;

Tensor view(const Tensor& x, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int64_t offset) {
  AtenTensorHandle y;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), sizes.size(), sizes.data(), strides.data(), offset, &y));
  return Tensor(y);
}

Tensor typed(const Tensor& x, const std::string& name) {
  using torch::headeronly::ScalarType;
  ScalarType type = name == "float8_e4m3fn" ? ScalarType::Float8_e4m3fn : name == "float8_e5m2" ? ScalarType::Float8_e5m2 : ScalarType::Float8_e8m0fnu;
  STD_TORCH_CHECK(type != ScalarType::Float8_e8m0fnu || name == "float8_e8m0fnu", "qpass::row: no type ", name);
  StableIValue stack[] = {torch::stable::detail::from(x), torch::stable::detail::from(type)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::view", "dtype", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

#include "plan.h"

std::atomic<int64_t> planned_rows{0};
constexpr int64_t MOST_TRIES = 8;  // the first calls find kernels, through Python
constexpr size_t MOST_PLANS = 4;

// One call of a row: its results go behind the registers.
void make(const Call& call, std::vector<Part>& registers) {
  const auto& a = call.arguments;
  auto one = [&](int i) -> const Tensor& { return *registers[a[i].numbers[0]]; };
  auto maybe = [&](int i) { return a[i].numbers.empty() ? Part() : registers[a[i].numbers[0]]; };
  auto list = [&](int i) {
    std::vector<Tensor> tensors;
    for (int64_t number : a[i].numbers) tensors.push_back(*registers[number]);
    return tensors;
  };
  switch (call.what) {
    case Operator::VIEW:
      registers.emplace_back(view(one(0), a[1].numbers, a[2].numbers, a[3].numbers[0]));
      break;
    case Operator::TYPED:
      registers.emplace_back(typed(one(0), a[1].text));
      break;
    case Operator::LINEAR:
      registers.emplace_back(linear(one(0), one(1), maybe(2), maybe(3), maybe(4), maybe(5), a[6].text, maybe(7), a[8].value, maybe(9), a[10].text, maybe(11)));
      break;
    case Operator::ATTENTION:
      registers.emplace_back(attention(one(0), one(1), maybe(2), maybe(3), maybe(4), a[5].text, one(6), maybe(7), maybe(8), maybe(9), a[10].numbers[0],
                                       a[11].text, maybe(12), a[13].numbers[0], a[14].value, maybe(15), maybe(16), maybe(17), maybe(18), maybe(19),
                                       a[20].value.value_or(0), maybe(21)));
      break;
    case Operator::APPEND:
      registers.emplace_back(append(list(0), list(1), one(2), one(3), one(4), a[5].text, a[6].text, maybe(7), maybe(8)));
      break;
    case Operator::APPEND_ROTATED: {
      auto [length, q, k] = append_rotated(list(0), list(1), one(2), one(3), one(4), one(5), one(6), one(7), a[8].text, a[9].text, maybe(10), maybe(11));
      for (const Tensor& each : {length, q, k}) registers.emplace_back(each);
      break;
    }
    case Operator::WRITE_ROTATED:
      registers.emplace_back(write_rotated(one(0), one(1), one(2), one(3), one(4), one(5), one(6), one(7)));
      break;
  }
}

// The calls of a row from number `first` on. If that is all of it, and no plan is known for these layouts, it makes one; unless it
// has tried in vain too often.
void run_calls(const Row& row, size_t first, std::vector<Part>& registers, const std::vector<int64_t>& layout) {
  int64_t at_generation = generation;
  bool planning = first == 0;
  if (planning) {
    std::lock_guard lock(row.mutex);
    if (row.tried_at != at_generation) row.tried_at = at_generation, row.tries = 0;
    planning = row.tries < MOST_TRIES;
  }
  std::vector<Run> runs(row.calls.size());
  std::vector<Seen> seen;
  for (size_t c = first; c < row.calls.size(); c++) {
    struct Wanting {  // until the call is over, however it ends
      explicit Wanting(Run* run) { wanted_run = run; }
      ~Wanting() { wanted_run = nullptr; }
    } wanting(planning ? &runs[c] : nullptr);
    size_t before = registers.size();
    make(row.calls[c], registers);
    for (size_t i = before; planning && i < registers.size(); i++) seen.emplace_back(*registers[i]);
    for (int64_t number : row.calls[c].dead) registers[number].reset();
  }
  if (!planning) return;
  auto plan = plan_of(row, runs, seen, layout, at_generation);
  std::lock_guard lock(row.mutex);
  row.tries = plan ? 0 : row.tries + 1;
  if (!plan) return;
  if (row.plans.size() >= MOST_PLANS) row.plans.erase(row.plans.begin());
  row.plans.push_back(plan);
}

using Bundle = std::shared_ptr<const std::vector<Part>>;
std::map<int64_t, Bundle> bundles;
std::shared_mutex bundles_mutex;

// What a bundle keeps, see bundle.py.
Bundle unbundle(int64_t number) {
  {
    std::shared_lock lock(bundles_mutex);
    if (auto found = bundles.find(number); found != bundles.end()) return found->second;
  }
  auto tensors = in_python<std::vector<Tensor>>("qpass::unbundle", number);
  auto parts = std::make_shared<std::vector<Part>>(tensors.begin(), tensors.end());
  std::unique_lock lock(bundles_mutex);
  return bundles[number] = parts;
}
Bundle unbundle(const Part& bundle) {
  static const Bundle nothing = std::make_shared<std::vector<Part>>();
  return bundle ? unbundle(*(const int64_t*)bundle->const_data_ptr()) : nothing;
}

// A number that stands for the types, devices, sizes and strides of tensors.
uint64_t layouts_of(const std::vector<Part>& tensors) {
  static thread_local std::vector<int64_t> layout;
  look_at_all(tensors, tensors.size(), layout);
  for (const Part& part : tensors) {
    int32_t type, index;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(part->get(), &type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(part->get(), &index));
    layout.push_back(type), layout.push_back(index);
  }
  uint64_t mixed = layout.size();
  for (int64_t number : layout) mixed = (mixed ^ uint64_t(number)) * 0x9E3779B97F4A7C15ull, mixed ^= mixed >> 29;
  return mixed;
}

// What a row gives; an empty tensor in the place of a second result that it has not.
std::tuple<Tensor, Tensor> row(const Part& bundle, std::vector<Tensor> inputs, std::vector<Tensor> written, std::string text) {
  Bundle bundled = unbundle(bundle);
  std::pair<std::string, Layout> key{std::move(text), {int64_t(bundled->size() + inputs.size()), int64_t(written.size())}};
  auto found = known_rows.find(key);
  if (!found) known_rows.keep(key, *(found = read_row(key.first, key.second[0], key.second[1])));
  const Row& row = **found;
  std::vector<Part> registers;  // without those of the bundle
  registers.reserve(row.given + 3 * row.calls.size());
  for (auto* tensors : {&inputs, &written})
    for (Tensor& tensor : *tensors) registers.emplace_back(std::move(tensor));
  static thread_local std::vector<int64_t> layout;
  look_at_all(registers, registers.size(), layout);
  std::shared_ptr<const Plan> plan;
  {
    std::lock_guard lock(row.mutex);
    for (const auto& each : row.plans)
      if (each->at_generation == generation && each->layout == layout) plan = each;
  }
  int64_t before = bundled->size();  // registers that are not in the list
  size_t done = 0;
  if (plan) {
    done = run_plan(*plan, row, *bundled, registers);
    planned_rows += done == row.calls.size();
  }
  if (done < row.calls.size()) {
    int64_t results = 0;  // of the calls that were done
    for (size_t c = 0; c < done; c++) results += row.calls[c].results;
    registers.insert(registers.begin(), bundled->begin(), bundled->end());
    registers.resize(row.given + results);
    run_calls(row, done, registers, layout);
    before = 0;
  }
  auto given_back = [&](size_t i) { return *registers[row.gives[i] - before]; };
  Tensor first = given_back(0);
  return {first, row.gives.size() > 1 ? given_back(1) : empty({0}, type_of(first))};
}
