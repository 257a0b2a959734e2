// What slices stand for in a symbolic execution: whose contributions, how combined and rounded.
#pragma once

#include <cstdint>
#include <vector>

namespace dpcomm {

/// Values by number, counted by reference. The set of contributions is exact (one bit per rank).
/// How they were combined, in which order and with which roundings, is a 64-bit fingerprint: equal
/// expressions have equal fingerprints, and two different ones collide with a chance of 2^-64.
class Values {
 public:
  using Id = int32_t;

  struct Value {
    uint64_t fingerprint = 0;
    int64_t key = 0;        ///< operation, round, chunk and slice, as the prover numbers them
    int32_t roundings = 0;  ///< on the longest path of a contribution
    int32_t references = 0;
    bool complete = false;  ///< a reduction that is over: AVG has divided
  };

  explicit Values(int world) : words_((world + 63) / 64) {}

  Value& operator[](Id id) { return values_[id]; }
  const Value& operator[](Id id) const { return values_[id]; }

  /// A new value without contributions and with one reference.
  Id make(int64_t key) {
    Id id;
    if (free_.empty()) {
      id = static_cast<Id>(values_.size());
      values_.emplace_back();
      bits_.resize(bits_.size() + words_);
    } else {
      id = free_.back();
      free_.pop_back();
      values_[id] = Value();
      for (int i = 0; i < words_; ++i) bits(id)[i] = 0;
    }
    values_[id].key = key;
    values_[id].references = 1;
    return id;
  }
  /// A copy of `from` with one reference.
  Id copy(Id from) {
    const Id id = make(values_[from].key);
    const Value source = values_[from];
    values_[id] = source;
    values_[id].references = 1;
    for (int i = 0; i < words_; ++i) bits(id)[i] = bits(from)[i];
    return id;
  }
  void release(Id id) {
    if (--values_[id].references == 0) free_.push_back(id);
  }

  void add_contribution(Id id, int rank) { bits(id)[rank / 64] |= uint64_t{1} << rank % 64; }
  bool has_contribution(Id id, int rank) const { return bits(id)[rank / 64] >> rank % 64 & 1; }
  int contributions(Id id) const {
    int count = 0;
    for (int i = 0; i < words_; ++i) count += __builtin_popcountll(bits(id)[i]);
    return count;
  }
  /// Adds the contributions of `from`; a rank that both have is returned, else -1.
  int merge(Id into, Id from) {
    for (int i = 0; i < words_; ++i) {
      const uint64_t both = bits(into)[i] & bits(from)[i];
      if (both) return i * 64 + __builtin_ctzll(both);
      bits(into)[i] |= bits(from)[i];
    }
    return -1;
  }

  /// Mixes `part` into a fingerprint; the order matters.
  static uint64_t mix(uint64_t fingerprint, uint64_t part) {
    uint64_t x = fingerprint * 0x9e3779b97f4a7c15u + part + 0x632be59bd9b4e019u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
  }

 private:
  uint64_t* bits(Id id) { return &bits_[static_cast<size_t>(id) * words_]; }
  const uint64_t* bits(Id id) const { return &bits_[static_cast<size_t>(id) * words_]; }

  int words_;
  std::vector<Value> values_;
  std::vector<uint64_t> bits_;
  std::vector<Id> free_;
};

}  // namespace dpcomm
