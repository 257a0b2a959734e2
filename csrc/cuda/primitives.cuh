// What a step does with bytes, once its slots are there to be read and written. All threads of a
// block take part; a warp works on a tile (wire.cuh) at a time.
//
//   move       verbatim: own input or a slot -> slots, output
//   receive    a slot in lossy format -> output, and verbatim to slots
//   reduce     slots and own input -> slots, output; with no slot to read: encodes the own input
//
// Each has a body for whole tiles of tensors that are aligned to 16 bytes, where every access has
// 16 bytes, and one for edges: the last tile of a slice, and tensors that are not so aligned. Slots
// always are. Memory is touched once: a reduction reads each slot and the own input, and writes
// each target; nothing is read back.
#pragma once

#include <type_traits>

#include "cuda/kernel_args.h"
#include "cuda/wire.cuh"
#include "schedule/step.h"

namespace dpcomm::gpu {

/// What all threads of a block do in a step. In shared memory.
struct Command {
  const char* own;  ///< in the input
  char* output;
  uint32_t elems;
  int32_t sources;    ///< slots to be read, in ascending order of rank
  int32_t own_place;  ///< in that order, the number of sources before the own contribution
  int32_t targets;    ///< slots to be written, all alike
  uint8_t primitive;  ///< flags of Primitive
  bool aligned;       ///< own and output, where they are used: to 16 bytes
  bool words;         ///< the same, to 4 bytes
  bool own_as_sent;
  bool premultiply;
  ReduceOp op;      ///< that combines
  int32_t divisor;  ///< 0: no division
  double factor;
  const char* source[kMaxDeviceRanks];
  char* target[kMaxDeviceRanks];

  DPCOMM_DEVICE bool has(uint8_t flags) const { return (primitive & flags) == flags; }
};

DPCOMM_DEVICE uint32_t lane_in_warp() { return thread() % 32; }
DPCOMM_DEVICE uint32_t warp_in_block() { return thread() / 32; }
DPCOMM_DEVICE uint32_t warps_in_block() { return threads() / 32; }

// --- 16 bytes of which only the first elements exist --------------------------------------------

template <uint32_t kBytes>
struct Unsigned;
template <>
struct Unsigned<1> {
  using type = uint8_t;
};
template <>
struct Unsigned<2> {
  using type = uint16_t;
};
template <>
struct Unsigned<4> {
  using type = uint32_t;
};
template <>
struct Unsigned<8> {
  using type = uint64_t;
};

/// The first n elements of kBytes at `place`; zeros for the others. A loop, because edges are few
/// and code is what they cost.
template <uint32_t kBytes>
DPCOMM_DEVICE Vec16 load_part(const char* place, uint32_t n) {
  uint64_t low = 0;
  uint64_t high = 0;
  const uint32_t bytes = anew(n * kBytes);
  DPCOMM_NO_UNROLL
  for (uint32_t at = 0; at < bytes; at += kBytes) {
    const uint64_t word = load_one<typename Unsigned<kBytes>::type>(place + at);
    const uint64_t shifted = word << (8 * (at % 8));
    if (at < 8) {
      low |= shifted;
    } else {
      high |= shifted;
    }
  }
  return vector_of(low, high);
}

template <uint32_t kBytes>
DPCOMM_DEVICE void store_part(char* place, const Vec16& v, uint32_t n) {
  using Word = typename Unsigned<kBytes>::type;
  const uint64_t low = low_half(v);
  const uint64_t high = high_half(v);
  const uint32_t bytes = anew(n * kBytes);
  DPCOMM_NO_UNROLL
  for (uint32_t at = 0; at < bytes; at += kBytes) {
    store_one(place + at, static_cast<Word>((at < 8 ? low : high) >> (8 * (at % 8))));
  }
}

/// A vector of a slot's payload, of which n elements exist.
template <bool kWhole, uint32_t kBytes>
DPCOMM_DEVICE Vec16 load_payload(const char* place, uint32_t n) {
  if (kWhole || n == 16 / kBytes) return load16(place);
  return load_part<kBytes>(place, n);
}
template <bool kWhole, uint32_t kBytes>
DPCOMM_DEVICE void store_payload(char* place, const Vec16& v, uint32_t n) {
  if (kWhole || n == 16 / kBytes) return store16(place, v);
  store_part<kBytes>(place, v, n);
}

/// How many of the `most` elements from `at` on exist.
DPCOMM_DEVICE uint32_t existing(uint32_t elems, uint32_t at, uint32_t most) {
  if (at >= elems) return 0;
  return elems - at < most ? elems - at : most;
}

// --- move ---------------------------------------------------------------------------------------

/// `elems` elements of kBytes from `from` to `output` (unless null) and to all targets.
template <uint32_t kBytes>
DPCOMM_DEVICE void move(const Command& command, const char* from, char* output) {
  constexpr uint32_t kVec = 16 / kBytes;
  constexpr uint32_t kVectors = 4;
  constexpr uint32_t kTile = 32 * kVec * kVectors;
  const uint32_t elems = command.elems;
  const int targets = command.targets;
  const uint32_t lane = lane_in_warp();
  const uint32_t stride = warps_in_block() * kTile;
  DPCOMM_NO_UNROLL
  for (uint32_t first = warp_in_block() * kTile; first < elems; first += stride) {
    if (command.aligned && first + kTile <= elems) {
      const size_t at = (first + lane * kVec) * size_t{kBytes};
      Vec16 v[kVectors];
      DPCOMM_UNROLL
      for (uint32_t j = 0; j < kVectors; ++j) v[j] = load16(from + at + j * 512);
      DPCOMM_NO_UNROLL
      for (int i = 0; i < targets; ++i) {
        DPCOMM_UNROLL
        for (uint32_t j = 0; j < kVectors; ++j) store16(command.target[i] + at + j * 512, v[j]);
      }
      if (output == nullptr) continue;
      DPCOMM_UNROLL
      for (uint32_t j = 0; j < kVectors; ++j) store16(output + at + j * 512, v[j]);
      continue;
    }
    DPCOMM_NO_UNROLL
    for (uint32_t j = 0; j < kVectors; ++j) {
      const uint32_t element = first + (j * 32 + lane) * kVec;
      const uint32_t n = existing(elems, element, kVec);
      const size_t at = element * size_t{kBytes};
      if (command.aligned && n == kVec) {
        const Vec16 v = load16(from + at);
        DPCOMM_NO_UNROLL
        for (int i = 0; i < targets; ++i) store16(command.target[i] + at, v);
        if (output != nullptr) store16(output + at, v);
      } else if (kBytes == 1 && command.words && n == kVec) {
        const Vec16 v = load_part<4>(from + at, 4);
        DPCOMM_NO_UNROLL
        for (int i = 0; i < targets; ++i) store16(command.target[i] + at, v);
        if (output != nullptr) store_part<4>(output + at, v, 4);
      } else {
        const Vec16 v = load_part<kBytes>(from + at, n);
        DPCOMM_NO_UNROLL
        for (int i = 0; i < targets; ++i) {
          store_payload<false, kBytes>(command.target[i] + at, v, n);
        }
        if (output != nullptr) store_part<kBytes>(output + at, v, n);
      }
    }
  }
}

// --- tensors and slots with accumulators --------------------------------------------------------

template <class Wire>
struct Primitives {
  using Element = typename Wire::Element;
  using Acc = typename Element::Acc;
  static constexpr uint32_t kVec = Wire::kVec;
  static constexpr uint32_t kVectors = Wire::kVectors;
  static constexpr uint32_t kTile = 32 * kVec * kVectors;
  static constexpr bool kBlocked = Wire::kBlockLanes > 0;
  static constexpr uint32_t kTensorVec = 16 / Element::kBytes;   // elements in 16 bytes of tensor
  static constexpr uint32_t kTensorVectors = kVec / kTensorVec;  // of those in a vector of wire

  /// The own contribution. Here and below `first` is the first element of the lane's vector 0, and
  /// values are [vector][element].
  template <bool kWhole>
  static DPCOMM_DEVICE void load_own(const Command& command, uint32_t first, Acc (*own)[kVec]) {
    const char* place = command.own + first * size_t{Element::kBytes};
    DPCOMM_UNROLL
    for (uint32_t j = 0; j < kVectors; ++j) {
      const uint32_t n = existing(command.elems, first + j * 32 * kVec, kVec);
      DPCOMM_UNROLL
      for (uint32_t i = 0; i < kTensorVectors; ++i) {
        const char* at = place + (j * 32 * kTensorVectors + i) * 16;
        const Vec16 v =
            kWhole ? load16(at)
                   : load_part<Element::kBytes>(at, existing(n, i * kTensorVec, kTensorVec));
        Element::unpack(v, own[j] + i * kTensorVec);
      }
    }
    if constexpr (requires { Element::rounded(Acc{}); }) {
      if (!command.premultiply) return;
      const Acc factor = static_cast<Acc>(command.factor);
      DPCOMM_UNROLL
      for (uint32_t j = 0; j < kVectors; ++j) {
        DPCOMM_UNROLL
        for (uint32_t i = 0; i < kVec; ++i) own[j][i] = Element::rounded(own[j][i] * factor);
      }
    }
  }

  template <bool kWhole>
  static DPCOMM_DEVICE void store_output(const Command& command, uint32_t first,
                                         const Acc (*values)[kVec]) {
    char* place = command.output + first * size_t{Element::kBytes};
    DPCOMM_UNROLL
    for (uint32_t j = 0; j < kVectors; ++j) {
      const uint32_t n = existing(command.elems, first + j * 32 * kVec, kVec);
      DPCOMM_UNROLL
      for (uint32_t i = 0; i < kTensorVectors; ++i) {
        char* at = place + (j * 32 * kTensorVectors + i) * 16;
        const Vec16 v = Element::pack(values[j] + i * kTensorVec);
        if (kWhole) {
          store16(at, v);
        } else {
          store_part<Element::kBytes>(at, v, existing(n, i * kTensorVec, kTensorVec));
        }
      }
    }
  }

  /// The exponent byte of the lane's block, of a slice that starts at `slot`.
  static DPCOMM_DEVICE uint32_t load_byte(const char* slot, uint32_t at, uint32_t elems) {
    if constexpr (kBlocked) {
      return at < elems ? load_one<uint8_t>(slot + at / Wire::kBlock) : Wire::Scale::kLeastByte;
    }
    return 0;
  }

  /// The exponent byte of the lane's block of values. All lanes of the warp take part.
  static DPCOMM_DEVICE uint32_t byte_of(const Acc (*values)[kVec]) {
    if constexpr (kBlocked) {
      uint32_t largest = 0;
      DPCOMM_UNROLL
      for (uint32_t j = 0; j < kVectors; ++j) {
        DPCOMM_UNROLL
        for (uint32_t i = 0; i < kVec; ++i) {
          const uint32_t magnitude = finite_magnitude(values[j][i]);
          largest = magnitude > largest ? magnitude : largest;
        }
      }
      return Wire::Scale::byte_of(max_over<Wire::kBlockLanes>(largest));
    }
    return 0;
  }

  static DPCOMM_DEVICE void encode(const Acc (*values)[kVec], uint32_t byte, Vec16* to) {
    DPCOMM_UNROLL
    for (uint32_t j = 0; j < kVectors; ++j) to[j] = Wire::encode(values[j], byte);
  }
  static DPCOMM_DEVICE void decode(const Vec16* from, uint32_t byte, Acc (*values)[kVec]) {
    DPCOMM_UNROLL
    for (uint32_t j = 0; j < kVectors; ++j) Wire::decode(from[j], byte, values[j]);
  }

  static DPCOMM_DEVICE void divide(Acc (*values)[kVec], int32_t divisor) {
    DPCOMM_UNROLL
    for (uint32_t j = 0; j < kVectors; ++j) {
      DPCOMM_UNROLL
      for (uint32_t i = 0; i < kVec; ++i) values[j][i] = quotient(values[j][i], divisor);
    }
  }

  static DPCOMM_DEVICE void start(ReduceOp op, Acc (*sum)[kVec]) {
    DPCOMM_UNROLL
    for (uint32_t j = 0; j < kVectors; ++j) {
      DPCOMM_UNROLL
      for (uint32_t i = 0; i < kVec; ++i) sum[j][i] = identity<Acc>(op);
    }
  }
  static DPCOMM_DEVICE void add(ReduceOp op, Acc (*sum)[kVec], const Acc (*x)[kVec]) {
    combine<Wire::kLossy, kVectors * kVec>(op, sum[0], x[0]);
  }

  /// The lane's vectors of a slice's payload that starts at `payload`.
  template <bool kWhole>
  static DPCOMM_DEVICE void load_slice(const char* payload, uint32_t elems, uint32_t first,
                                       Vec16* to) {
    DPCOMM_UNROLL
    for (uint32_t j = 0; j < kVectors; ++j) {
      const uint32_t at = first + j * 32 * kVec;
      to[j] = load_payload<kWhole, Wire::kBytes>(payload + at * size_t{Wire::kBytes},
                                                 existing(elems, at, kVec));
    }
  }
  template <bool kWhole>
  static DPCOMM_DEVICE void store_slice(char* payload, uint32_t elems, uint32_t first,
                                        const Vec16* from) {
    DPCOMM_UNROLL
    for (uint32_t j = 0; j < kVectors; ++j) {
      const uint32_t at = first + j * 32 * kVec;
      store_payload<kWhole, Wire::kBytes>(payload + at * size_t{Wire::kBytes}, from[j],
                                          existing(elems, at, kVec));
    }
  }

  /// sum op= kBatch slices, source[from] and those after it: all are loaded before any is added.
  template <bool kWhole, int kBatch>
  static DPCOMM_DEVICE void add_batch(const Command& command, int from, uint32_t first,
                                      Acc (*sum)[kVec]) {
    const uint32_t header = Wire::header_bytes(command.elems);
    Vec16 encoded[kBatch][kVectors];
    uint32_t byte[kBatch];
    DPCOMM_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const char* slot = command.source[from + b];
      byte[b] = load_byte(slot, first, command.elems);
      load_slice<kWhole>(slot + header, command.elems, first, encoded[b]);
    }
    DPCOMM_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      Acc x[kVectors][kVec];
      decode(encoded[b], byte[b], x);
      add(command.op, sum, x);
    }
  }

  /// sum op= the slices in source[from, to).
  template <bool kWhole, int kBatch>
  static DPCOMM_DEVICE void add_sources(const Command& command, int from, int to, uint32_t first,
                                        Acc (*sum)[kVec]) {
    int next = from;
    if constexpr (kBatch > 1) {
      DPCOMM_NO_UNROLL
      for (; next + kBatch <= to; next += kBatch) {
        add_batch<kWhole, kBatch>(command, next, first, sum);
      }
    }
    DPCOMM_NO_UNROLL
    for (; next < to; ++next) add_batch<kWhole, 1>(command, next, first, sum);
  }

  /// Writes the sum to all targets. With kCopy it becomes what the receivers decode (law 2).
  template <bool kWhole>
  static DPCOMM_DEVICE void send_sum(const Command& command, uint32_t first, Acc (*sum)[kVec]) {
    const uint32_t elems = command.elems;
    const uint32_t header = Wire::header_bytes(elems);
    const uint32_t byte = byte_of(sum);
    Vec16 encoded[kVectors];
    encode(sum, byte, encoded);
    const bool writes_byte = lane_in_warp() % (kBlocked ? Wire::kBlockLanes : 1) == 0;
    DPCOMM_NO_UNROLL
    for (int i = 0; i < command.targets; ++i) {
      char* slot = command.target[i];
      store_slice<kWhole>(slot + header, elems, first, encoded);
      if constexpr (kBlocked) {
        if (writes_byte && first < elems) {
          store_one(slot + first / Wire::kBlock, static_cast<uint8_t>(byte));
        }
      }
    }
    if (Wire::kLossy && command.has(kCopy)) decode(encoded, byte, sum);
  }

  /// kAsSent: the own contribution counts as decode(encode(x)).
  template <bool kWhole, bool kAsSent>
  static DPCOMM_DEVICE void reduce_tile(const Command& command, uint32_t first) {
    constexpr int kBatch = kWhole && !kAsSent ? Wire::kBatch : 1;
    const int place = command.own_place;
    Acc sum[kVectors][kVec];
    if constexpr (kAsSent) {
      load_own<kWhole>(command, first, sum);
      const uint32_t byte = byte_of(sum);
      Vec16 sent[kVectors];
      encode(sum, byte, sent);
      DPCOMM_UNROLL
      for (uint32_t j = 0; j < kVectors; ++j) {  // encoded now, not when it is added
        DPCOMM_UNROLL
        for (int i = 0; i < 4; ++i) sent[j].w[i] = anew(sent[j].w[i]);
      }
      start(command.op, sum);
      add_sources<kWhole, kBatch>(command, 0, place, first, sum);
      Acc own[kVectors][kVec];
      decode(sent, byte, own);
      add(command.op, sum, own);
    } else if (place > 0) {
      start(command.op, sum);
      add_sources<kWhole, kBatch>(command, 0, place, first, sum);
      Acc own[kVectors][kVec];
      load_own<kWhole>(command, first, own);
      add(command.op, sum, own);
    } else {
      load_own<kWhole>(command, first, sum);
    }
    add_sources<kWhole, kBatch>(command, place, command.sources, first, sum);
    first = anew(first);
    if (command.divisor != 0) divide(sum, command.divisor);
    if (command.targets > 0) send_sum<kWhole>(command, first, sum);
    if (command.has(kCopy)) store_output<kWhole>(command, anew(first), sum);
  }

  /// Calls body(std::bool_constant<whole>, first) for each tile of the warp; `first` is the lane's.
  template <class Body>
  static DPCOMM_DEVICE void for_tiles(const Command& command, Body body) {
    DPCOMM_NO_UNROLL
    for (uint32_t tile = warp_in_block() * kTile; tile < command.elems;
         tile += warps_in_block() * kTile) {
      const uint32_t first = anew(tile + lane_in_warp() * kVec);
      if (command.aligned && tile + kTile <= command.elems) {
        body(std::true_type(), first);
      } else {
        body(std::false_type(), first);
      }
    }
  }

  static DPCOMM_DEVICE void reduce(const Command& command) {
    if (Wire::kLossy && command.own_as_sent) {
      for_tiles(command, [&]<bool kWhole>(std::bool_constant<kWhole>, uint32_t first) {
        reduce_tile<kWhole, Wire::kLossy>(command, first);
      });
    } else {
      for_tiles(command, [&]<bool kWhole>(std::bool_constant<kWhole>, uint32_t first) {
        reduce_tile<kWhole, false>(command, first);
      });
    }
    if constexpr (kBlocked) {  // the header's padding is zero
      const uint32_t at = static_cast<uint32_t>(Wire::Places::blocks(command.elems)) + thread();
      DPCOMM_NO_UNROLL
      for (int i = 0; at < Wire::header_bytes(command.elems) && i < command.targets; ++i) {
        store_one(command.target[i] + at, uint8_t{0});
      }
    }
  }

  template <bool kWhole>
  static DPCOMM_DEVICE void receive_tile(const Command& command, uint32_t first) {
    const uint32_t elems = command.elems;
    const uint32_t header = Wire::header_bytes(elems);
    const char* slot = command.source[0];
    const uint32_t byte = load_byte(slot, first, elems);
    Vec16 encoded[kVectors];
    load_slice<kWhole>(slot + header, elems, first, encoded);
    DPCOMM_NO_UNROLL
    for (int i = 0; i < command.targets; ++i) {
      store_slice<kWhole>(command.target[i] + header, elems, first, encoded);
    }
    if (!command.has(kCopy)) return;
    Acc x[kVectors][kVec];
    decode(encoded, byte, x);
    store_output<kWhole>(command, first, x);
  }

  static DPCOMM_DEVICE void receive(const Command& command) {
    const uint32_t header = command.targets > 0 ? Wire::header_bytes(command.elems) : 0;
    DPCOMM_NO_UNROLL
    for (uint32_t at = thread() * 16; at < header; at += threads() * 16) {
      const Vec16 v = load16(command.source[0] + at);
      DPCOMM_NO_UNROLL
      for (int i = 0; i < command.targets; ++i) store16(command.target[i] + at, v);
    }
    for_tiles(command, [&]<bool kWhole>(std::bool_constant<kWhole>, uint32_t first) {
      receive_tile<kWhole>(command, first);
    });
  }
};

/// Does the step's work on bytes. All threads of the block; no barrier within.
template <class Wire>
DPCOMM_DEVICE void perform(const Command& command) {
  using Element = typename Wire::Element;
  const bool recv = command.has(kRecv);
  if constexpr (requires { typename Element::Acc; }) {
    const bool encode = !recv && command.has(kSend) && (Wire::kLossy || command.premultiply);
    if (encode || command.has(kReduce)) return Primitives<Wire>::reduce(command);
    if (Wire::kLossy && recv) return Primitives<Wire>::receive(command);
  }
  const char* from = recv ? command.source[0] : command.own;
  char* output = command.has(kCopy) && command.output != from ? command.output : nullptr;
  move<Element::kBytes>(command, from, output);
}

}  // namespace dpcomm::gpu
