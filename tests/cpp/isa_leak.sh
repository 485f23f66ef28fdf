#!/usr/bin/env bash
# Proves on the built archive that no newer machine's instruction can reach an older one: isa_leak.sh LIBDHSA_CORE.A
#   1. Baseline objects hold no VEX or EVEX instruction: on x86-64, every mnemonic that begins with v.
#   2. Objects of an ISA folder define weak symbols in the ISA's own namespace only. The linker keeps one of several
#      weak copies: of an inline function that both sides compile it could keep the newer machine's, for all.
# OBJDUMP, NM and AR name the tools of the archive's machine.
set -euo pipefail
archive=$(realpath "$1")
objdump=${OBJDUMP:-objdump} nm=${NM:-nm} ar=${AR:-ar}

# Every ISA folder's object is named kernels.cpp.o: members are told apart by the table that they define.
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
declare -A seen
while read -r member; do
  seen[$member]=$((${seen[$member]:-0} + 1))
  (cd "$objects" && "$ar" xN "${seen[$member]}" "$archive" "$member" && mv "$member" "${seen[$member]}-$member")
done < <("$ar" t "$archive")

fail() {
  printf 'ISA leak: %s\n' "$1" >&2
  exit 1
}
isas=0 baselines=0
for object in "$objects"/*; do
  table=$("$nm" --defined-only "$object" | grep -oP 'dhsa3cpu\d+k\K\w+(?=KernelsE$)' || true)
  if [[ -n $table && $table != Scalar ]]; then
    own=_ZZ?N4dhsa3cpu${#table}${table,,}
    weak=$("$nm" --defined-only "$object" | grep -E ' [VWuvw] ' | grep -m 1 -vE " $own" || true)
    [[ -z $weak ]] || fail "the $table object defines the weak symbol $(c++filt <<<"$weak")"
    isas=$((isas + 1))
  else
    vex=$("$objdump" -d --no-show-raw-insn "$object" | grep -m 1 -P '^\s+[0-9a-f]+:\s+v(?!er[rw])' || true)
    [[ -z $vex ]] || fail "baseline object ${object##*/} holds $vex"
    baselines=$((baselines + 1))
  fi
done
((isas > 0 && baselines > 0)) || fail "expected ISA and baseline objects, got $isas and $baselines"
echo "ISA leak: none, in $baselines baseline and $isas ISA objects"
