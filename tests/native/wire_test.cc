// Every instruction set gives the bits of the scalar kernels, at any alignment, and writes nothing
// outside of its slice (the sanitizers watch; tests/wire holds the scalar kernels to the oracle).
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "wire/codec.h"

namespace dpcomm {
namespace {

using Bytes = std::vector<uint8_t>;

/// Random bytes; every fourth 32-bit word is one that floats find hard.
Bytes random_bytes(std::mt19937_64& random, size_t size) {
  constexpr uint32_t kHard[] = {0,          0x80000000, 0x7f800000, 0xff800000, 0x7fc00001,
                                0xff800001, 0x7f7fffff, 0x00000001, 0x80000001, 0x00800000,
                                0x7c007c00, 0x7e01fc00, 0x7f80ff80, 0x00010001, 0x3f800000};
  Bytes bytes(size);
  for (size_t i = 0; i < size; i += 4) {
    uint32_t word = static_cast<uint32_t>(random());
    if (word % 4 == 0) word = kHard[random() % std::size(kHard)];
    std::memcpy(&bytes[i], &word, size - i < 4 ? size - i : 4);
  }
  return bytes;
}

/// What one codec does with n elements: the slice, and the accumulator after each call.
struct Results {
  Bytes slice, kept, loaded, combined[kReduceOps];
};

/// The accumulator as a tensor of `dtype`: NaN is canonical there, so that bits can be compared.
Bytes as_tensor(Dtype dtype, Bytes acc, size_t n) {
  const Codec& codec = tensor_codec(dtype, Isa::kScalar);
  Bytes tensor(codec.slice_bytes(n));
  codec.store(tensor.data(), n, 0, acc.data(), n, false);
  return tensor;
}

Results results(const Codec& codec, Dtype dtype, const Bytes& acc, const Bytes& tensor, size_t n,
                size_t offset) {
  Results all;
  Bytes slice(offset + codec.slice_bytes(n), 0xa5);
  all.kept = acc;
  codec.store(slice.data() + offset, n, 0, all.kept.data(), n, true);
  all.slice.assign(slice.begin() + static_cast<ptrdiff_t>(offset), slice.end());
  if (!tensor.empty()) {
    slice.resize(offset);
    slice.insert(slice.end(), tensor.begin(), tensor.end());
  }
  Bytes loaded(acc.size(), 0xa5);
  codec.load(loaded.data(), slice.data() + offset, n, 0, n);
  all.loaded = as_tensor(dtype, loaded, n);
  for (int op = 0; op < kReduceOps; ++op) {
    if (codec.combine[op] == nullptr) continue;
    Bytes into = acc;
    codec.combine[op](into.data(), slice.data() + offset, n, 0, n);
    all.combined[op] = as_tensor(dtype, into, n);
  }
  return all;
}

void compare(WireFormat wire, Dtype dtype, Isa isa, size_t n, std::mt19937_64& random) {
  const bool native = wire == WireFormat::kNative;
  const Bytes acc = random_bytes(random, n * accumulator_bytes(dtype));
  const Bytes tensor = native ? random_bytes(random, n * size_bytes(dtype)) : Bytes();
  const Results want =
      results(wire_codec(wire, dtype, Isa::kScalar), dtype, acc, tensor, n, native ? 1 : 0);
  const Results got =
      results(wire_codec(wire, dtype, isa), dtype, acc, tensor, n, native ? random() % 64 : 0);
  CHECK(got.slice == want.slice);
  CHECK(got.kept == want.kept);
  CHECK(got.loaded == want.loaded);
  for (int op = 0; op < kReduceOps; ++op) CHECK(got.combined[op] == want.combined[op]);
}

TEST(every_instruction_set_gives_the_scalar_bits) {
  std::mt19937_64 random(check::seed());
  const size_t lengths[] = {0, 1, 15, 16, 17, 127, 128, 129, 511, 512, 513, 1025, 3000};
  for (int round = 0; round < (check::long_run() ? 200 : 3); ++round) {
    for (size_t n : lengths) {
      for (int isa = 0; isa < kIsas; ++isa) {
        if (!isa_available(static_cast<Isa>(isa))) continue;
        for (int type = 0; type < kDtypes; ++type) {
          const Dtype dtype = static_cast<Dtype>(type);
          for (int wire = 0; wire < kWireFormats; ++wire) {
            if (wire != 0 && !accumulates_in_fp32(dtype)) continue;
            compare(static_cast<WireFormat>(wire), dtype, static_cast<Isa>(isa), n, random);
          }
        }
      }
    }
  }
}

TEST(arithmetic_gives_the_scalar_bits) {
  std::mt19937_64 random(check::seed());
  const size_t n = 777;
  for (int isa = 0; isa < kIsas; ++isa) {
    if (!isa_available(static_cast<Isa>(isa))) continue;
    for (int type = 0; type < kDtypes; ++type) {
      const Dtype dtype = static_cast<Dtype>(type);
      Bytes want = random_bytes(random, n * accumulator_bytes(dtype)), got = want;
      const AccumulatorOps& reference = accumulator_ops(dtype, Isa::kScalar);
      const AccumulatorOps& ops = accumulator_ops(dtype, static_cast<Isa>(isa));
      CHECK_EQ(reference.divide == nullptr, dtype == Dtype::kBool);
      CHECK_EQ(reference.premultiply == nullptr, !is_floating(dtype));
      if (ops.premultiply != nullptr) {
        reference.premultiply(want.data(), 1.0 / 3, n);
        ops.premultiply(got.data(), 1.0 / 3, n);
        CHECK(got == want);
      }
      if (ops.divide != nullptr) {
        reference.divide(want.data(), 7, n);
        ops.divide(got.data(), 7, n);
      }
      CHECK(as_tensor(dtype, got, n) == as_tensor(dtype, want, n));
    }
  }
}

TEST(the_fused_sum_gives_the_bits_of_its_parts) {
  std::mt19937_64 random(check::seed());
  for (int isa = 0; isa < kIsas; ++isa) {
    if (!isa_available(static_cast<Isa>(isa))) continue;
    for (size_t n : {0, 1, 63, 64, 65, 1000}) {
      for (int sources = 1; sources <= 6; ++sources) {
        std::vector<Bytes> arrays;
        std::vector<const float*> from;
        for (int s = 0; s < sources; ++s) {
          // One byte on: no alignment at all.
          arrays.push_back(random_bytes(random, 4 * n + 1));
          from.push_back(reinterpret_cast<const float*>(arrays.back().data() + 1));
        }
        const Codec& codec = tensor_codec(Dtype::kFloat32, Isa::kScalar);
        Bytes acc(4 * n);
        codec.load(acc.data(), from[0], n, 0, n);
        for (int s = 1; s < sources; ++s) {
          codec.combine[static_cast<int>(ReduceOp::kSum)](acc.data(), from[s], n, 0, n);
        }
        accumulator_ops(Dtype::kFloat32, Isa::kScalar).divide(acc.data(), sources, n);
        const Bytes want = as_tensor(Dtype::kFloat32, acc, n);
        // One destination of its own, one that is a source as well.
        Bytes out(4 * n + 1, 0xa5);
        float* to[] = {reinterpret_cast<float*>(out.data() + 1), const_cast<float*>(from.back())};
        sum_f32(static_cast<Isa>(isa))(to, 2, from.data(), sources, sources, n);
        CHECK(Bytes(out.begin() + 1, out.end()) == want);
        CHECK(Bytes(arrays.back().begin() + 1, arrays.back().end()) == want);
      }
    }
  }
}

}  // namespace
}  // namespace dpcomm
