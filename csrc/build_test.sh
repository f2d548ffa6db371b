#!/bin/sh
# Builds the test program: build_test.sh OUT_DIR [JOBS]. A translation unit a tile, so that many processors help.
set -eu
cd "$(dirname "$0")"
out=$1 jobs=${2:-2} nvcc=${NVCC:-nvcc}
command -v "$nvcc" >/dev/null || nvcc=/usr/local/cuda/bin/nvcc
flags="-std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -Xptxas -v ${LACO_TEST_FLAGS:-}"
mkdir -p "$out/obj"

# name, then BM, BN, stages, cluster, pingpong, consumers, store buffers
cat >"$out/tiles" <<'TILES'
c1_128x256x4 128,256,4,1
c1_128x256x3 128,256,3,1
c1_128x192x5 128,192,5,1,false,2,1
c1_192x128x4 192,128,4,1,false,3
c1_256x128x4 256,128,4,1
c2_128x256x4 128,256,4,2
c2_128x256x3 128,256,3,2
c2_128x192x5 128,192,5,2,false,2,1
c2_128x192x4 128,192,4,2
c2_192x128x4 192,128,4,2,false,3
c2_192x128x5 192,128,5,2,false,3,1
c2_256x128x4 256,128,4,2
c2_128x128x6 128,128,6,2
p1_128x128x6 128,128,6,1,true
p2_128x128x6 128,128,6,2,true
p2_64x256x4 64,256,4,2,true
p2_64x256x5 64,256,5,2,true,2,1
TILES
rm -f "$out"/obj/*
for unit in test_hopper test_reference test_timing test_probe; do
  echo "$nvcc $flags -c $unit.cu -o $out/obj/$unit.o" >"$out/obj/$unit.sh"
done
while read -r name tile; do
  printf '#define LACO_NAME "%s"\n#define LACO_TILE Tile<%s>\n#include "test_variant.cu"\n' "$name" "$tile" >"$out/obj/$name.cu"
  echo "$nvcc $flags -I. -c $out/obj/$name.cu -o $out/obj/$name.o" >"$out/obj/$name.sh"
done <"$out/tiles"
ls "$out"/obj/*.sh | xargs -P "$jobs" -I{} sh -c 'sh {} >{}.log 2>&1' || {
  grep -hE 'error|fatal' "$out"/obj/*.log | head -40
  exit 1
}
"$nvcc" -gencode=arch=compute_90a,code=sm_90a -Xcompiler -static-libstdc++,-static-libgcc "$out"/obj/*.o -o "$out/test_hopper"
cat "$out"/obj/*.log >"$out/build.log"
rm -r "$out/obj" "$out/tiles"

# The gate: no spills, every role within its registers, nothing serialised. Tracing calls printf, which does both.
case ${LACO_TEST_FLAGS:-} in *LACO_TRACE_WAITS*) exit 0 ;; esac
if grep -E 'C75(08|10|11)|[1-9][0-9]* bytes spill' "$out/build.log" | head -5 | grep .; then
  echo "build_test.sh: spills or ignored instructions, see $out/build.log" >&2
  exit 1
fi
