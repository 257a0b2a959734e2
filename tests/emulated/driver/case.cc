#include "case.h"

#include <istream>
#include <sstream>
#include <stdexcept>

#include "schedule/registry.h"
#include "wire/wire_format.h"

namespace dpcomm::emulated {
namespace {

/// The words of one line. Every word has to be asked for.
class Words {
 public:
  Words(std::istream& in, const std::string& first) {
    std::string line, word;
    if (!std::getline(in, line)) throw std::runtime_error("no line that starts with " + first);
    std::istringstream words(line);
    words >> word;
    if (word != first) throw std::runtime_error("expected " + first + ", got: " + line);
    while (words >> word) {
      const size_t equals = word.find('=');
      if (equals == std::string::npos) throw std::runtime_error("no key=value: " + word);
      values_[word.substr(0, equals)] = word.substr(equals + 1);
    }
  }
  template <class T>
  void take(const char* key, T& to) {
    const auto found = values_.find(key);
    if (found == values_.end()) return;
    std::istringstream value(found->second);
    if (!(value >> to) || !value.eof()) {
      throw std::runtime_error(std::string("value of ") + key + ": " + found->second);
    }
    values_.erase(found);
  }
  /// The index of the value among `names`.
  template <class Name>
  uint8_t index(const char* key, int count, Name name) {
    std::string value;
    take(key, value);
    for (int i = 0; i < count; ++i) {
      if (value == name(i)) return static_cast<uint8_t>(i);
    }
    throw std::runtime_error(std::string("unknown ") + key + ": " + value);
  }
  void finish() const {
    if (!values_.empty()) throw std::runtime_error("unknown key: " + values_.begin()->first);
  }

 private:
  std::map<std::string, std::string> values_;
};

void read_operation(std::istream& in, int world, Operation& to) {
  Words words(in, "op");
  OpRecord& record = to.record;
  record.collective = words.index("collective", kCollectives,
                                  [](int i) { return name(static_cast<Collective>(i)); });
  std::string algorithm;
  words.take("algorithm", algorithm);
  const int found = find_algorithm(static_cast<Collective>(record.collective), algorithm);
  if (found < 0) throw std::runtime_error("unknown algorithm: " + algorithm);
  record.algorithm = static_cast<uint8_t>(found);
  record.dtype = words.index("dtype", kDtypes, [](int i) { return name(static_cast<Dtype>(i)); });
  record.op = words.index("op", kReduceOps, [](int i) { return name(static_cast<ReduceOp>(i)); });
  record.wire =
      words.index("wire", kWireFormats, [](int i) { return name(static_cast<WireFormat>(i)); });
  words.take("count", record.count);
  words.take("factor", record.factor);
  words.take("root", record.root);
  words.take("ctas", to.ctas);
  words.take("in_place", to.in_place);
  words.take("input_offset", to.input_offset);
  words.take("output_offset", to.output_offset);
  words.finish();
  for (int rank = 0; rank < world; ++rank) {
    std::string& bytes = to.inputs.emplace_back(to.has_input(rank) ? to.input_bytes(world) : 0, 0);
    if (!in.read(bytes.data(), bytes.size())) throw std::runtime_error("too few input bytes");
  }
}

}  // namespace

size_t Operation::input_bytes(int world) const {
  const bool scatters = record.collective == static_cast<uint8_t>(Collective::kReduceScatter);
  return record.count * size_bytes(static_cast<Dtype>(record.dtype)) * (scatters ? world : 1);
}

size_t Operation::output_bytes(int world, int rank) const {
  const Collective collective = static_cast<Collective>(record.collective);
  if (collective == Collective::kReduce && rank != record.root) return 0;
  return record.count * size_bytes(static_cast<Dtype>(record.dtype)) *
         (collective == Collective::kAllGather ? world : 1);
}

bool Operation::has_input(int rank) const {
  return record.collective != static_cast<uint8_t>(Collective::kBroadcast) || rank == record.root;
}

bool read_case(std::istream& in, Case& to) {
  if (in.peek() == std::istream::traits_type::eof()) return false;
  Words words(in, "case");
  int operations = 0;
  words.take("operations", operations);
  words.take("world", to.world);
  words.take("ctas", to.ctas);
  words.take("threads", to.threads);
  words.take("slots", to.slots);
  words.take("plan_slots", to.plan_slots);
  words.take("slot_bytes", to.slot_bytes);
  words.take("packets", to.packets);
  words.take("virtual_ranks", to.virtual_ranks);
  words.take("seed", to.seed);
  words.take("resident", to.resident);
  words.take("patience", to.patience);
  words.take("limit_s", to.limit_s);
  words.take("look_every", to.look_every);
  words.take("record_after", to.record_after);
  words.take("count", to.count);
  words.take("first_message", to.first_message);
  words.take("abort_at", to.abort_at);
  words.take("abort_rank", to.abort_rank);
  words.take("abort_all_at", to.abort_all_at);
  words.take("other_tag_rank", to.other_tag_rank);
  words.finish();
  for (int i = 0; i < operations; ++i) {
    read_operation(in, to.world, to.operations.emplace_back());
    to.operations.back().record.sequence = i + 1;
  }
  return true;
}

}  // namespace dpcomm::emulated
