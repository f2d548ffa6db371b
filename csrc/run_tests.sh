#!/bin/bash
# Runs the test program where the GPU is, in at most 60 seconds: run_tests.sh [BUILD_DIR]. Results go to $OUT too, if it is set.
# A tile that hangs is reported with the waits it is stuck in, then left out of everything that follows.
cd "$(dirname "$0")"
build=$(realpath -m "${1:-../build_csrc}")
results=${OUT:-$build}/hopper.txt
deadline=$((SECONDS + 57))
left() { echo $((deadline - SECONDS > 1 ? deadline - SECONDS : 1)); }
limit() { local most=$1 now; now=$(left); echo $((now < most ? now : most)); }

: >"$results"
: >"${results%.txt}-cases.txt"
exec > >(tee -a "$results") 2>&1

# Without a task the program exits with 2; what the loader refuses is higher, and is built again here.
"$build/test_hopper" >/dev/null 2>&1
if [ $? -gt 2 ]; then
  echo "building"
  timeout 40 ./build_test.sh "$build" "$(nproc)" || exit 1
fi
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit --format=csv,noheader

timeout "$(limit 10)" "$build/test_hopper" probe || echo "probe: status $?"

skip= from=0
for attempt in 1 2 3 4 5; do
  log=$(mktemp)
  timeout "$(limit 25)" "$build/test_hopper" check --skip "$skip" --from "$from" >"$log"
  echo "check from case $from: status $?, $(grep -c ^PASS "$log") passed, $(grep -c ^FAIL "$log") failed"
  grep -v ^PASS "$log" | head -150
  cat "$log" >>"${results%.txt}-cases.txt"
  stopped=$(grep '^STOPPED' "$log" | tail -1)
  rm -f "$log"
  [ -n "$stopped" ] || break
  read -r _ from case tile <<<"$stopped"
  skip=$skip,$tile
  if [ -x "$build/trace/test_hopper" ] && [ "$attempt" -le 2 ]; then
    timeout "$(limit 6)" "$build/trace/test_hopper" check --only "$case" --tile "$tile" | grep -v '^ ' | head -40
  fi
  [ "$(left)" -gt 15 ] || break
done

nvidia-smi --query-gpu=clocks.sm,temperature.gpu,power.draw --format=csv,noheader
timeout "$(left)" "$build/test_hopper" time --skip "$skip"
nvidia-smi --query-gpu=clocks.sm,temperature.gpu,power.draw,clocks_throttle_reasons.active --format=csv,noheader
echo "took $SECONDS s"
