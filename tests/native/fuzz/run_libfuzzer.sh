#!/usr/bin/env bash
# Fuzzes what reads strangers' bytes with libFuzzer: run_libfuzzer.sh [seconds]. Needs clang; the
# tests use fuzz_test.cc, which needs only g++.
set -euo pipefail
cd "$(dirname "$0")/../../.."
compiler=${CLANG:-clang++}
out=build/libfuzzer
mkdir -p $out/corpus
echo '#define DPCOMM_VERSION "fuzzed"' > $out/version.h  # which CMake defines otherwise
sources=$(ls csrc/base/*.cc csrc/wire/*.cc csrc/schedule/*.cc csrc/verify/*.cc csrc/transport/*.cc \
  csrc/cpu/*.cc csrc/comm/*.cc csrc/cuda/*.cc 2>/dev/null \
  | grep -vE 'csrc/cuda/(engine|peer_memory|plugin|rank_memory|tickets|virtual_group)\.cc' || true)
for source in $sources tests/native/fuzz/libfuzzer.cc; do
  flags=""
  case $source in *avx2*) flags="-mavx2 -mfma -mf16c" ;; *avx512*) flags="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c" ;; esac
  echo "$compiler -std=c++20 -O1 -g -w -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined $flags" \
    "-include $out/version.h -Icsrc -Itests/native -c $source -o $out/$(echo "$source" | tr / _).o"
done | xargs -P "$(nproc)" -I{} sh -c '{}'
$compiler -fsanitize=fuzzer,address,undefined $out/*.o -o $out/fuzz -ldl -pthread
$out/fuzz -max_total_time="${1:-60}" -max_len=2048 -print_final_stats=1 \
  -artifact_prefix=$out/ $out/corpus
