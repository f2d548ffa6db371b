#!/bin/sh
# Builds the test program: build_test.sh OUT_DIR [JOBS].
set -eu
cd "$(dirname "$0")"
out=$1 jobs=${2:-2} nvcc=${NVCC:-nvcc}
command -v "$nvcc" >/dev/null || nvcc=/usr/local/cuda/bin/nvcc
flags="-std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -Xptxas -v ${LACO_TEST_FLAGS:-}"
mkdir -p "$out/obj"

rm -f "$out"/obj/*
for unit in test_hopper test_reference test_timing test_probe hopper_128x256 hopper_192x128; do
  echo "$nvcc $flags -c $unit.cu -o $out/obj/$unit.o" >"$out/obj/$unit.sh"
done
ls "$out"/obj/*.sh | xargs -P "$jobs" -I{} sh -c 'sh {} >{}.log 2>&1' || {
  grep -hE 'error|fatal' "$out"/obj/*.log | head -40
  exit 1
}
"$nvcc" -gencode=arch=compute_90a,code=sm_90a -Xcompiler -static-libstdc++,-static-libgcc "$out"/obj/*.o -o "$out/test_hopper"
cat "$out"/obj/*.log >"$out/build.log"
rm -r "$out/obj"

# The gate: no spills, every role within its registers, nothing serialised. Tracing calls printf, which does both.
case ${LACO_TEST_FLAGS:-} in *LACO_TRACE_WAITS*) exit 0 ;; esac
if grep -E 'C75(08|10|11)|[1-9][0-9]* bytes spill' "$out/build.log" | head -5 | grep .; then
  echo "build_test.sh: spills or ignored instructions, see $out/build.log" >&2
  exit 1
fi
