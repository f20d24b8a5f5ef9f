#!/usr/bin/env bash
# Runs tests/arithmetic on processors that this machine does not have, under qemu's user emulation:
#
#   tests/arithmetic/emulate.sh                   all of them (half an hour on two cores)
#   tests/arithmetic/emulate.sh Nehalem Haswell   some
#   tests/arithmetic/emulate.sh --all Nehalem     with every other test of numbers (an hour)
#   tests/arithmetic/emulate.sh --few Nehalem     tests/arithmetic alone
#   tests/arithmetic/emulate.sh --ask cortex-a76  no tests: `medmoe-edge ask` there and on this machine,
#                                                 whose answers must be equal (two minutes)
#
# On x86 it also runs those of tests/unit that compute with ONNX Runtime, in this process: $also.
# arm-sme is an Arm processor with matrix instructions (as Apple's from M4 on).
# Needs qemu-user (Debian's package) and, for x86, an environment that has the extra `test`: the Python
# in $PYTHON, else `python`. For ARM it fetches, into build/arm64, an arm64 Python by apt (on Debian, no
# root needed) and the locked packages for it from PyPI.
# Everything runs in one process, since a child would leave the emulation.
set -euo pipefail
cd "$(dirname "$0")/../.."

unset OPENBLAS_CORETYPE # NumPy's BLAS, too, is to go by the emulated processor
x86=(Nehalem Haswell EPYC-Milan)
arm=(cortex-a72 cortex-a76 neoverse-v1 arm-sme)
also=(ort_matmul ort_moe ort_qkv pair_bound)
all=(agreement engine fidelity folding gptq half_graph mixed modality_engine ort_paged prefill
    prefix_cache quantise_pass quick rounding smooth stored verification vision_quantise)
python=${PYTHON:-python}
arm64=$PWD/build/arm64

# What the processor's DynamicQuantizeMatMul does with two large neighbours: test_op.py checks it.
arithmetic() {
    case $1 in
        Haswell | EPYC-Milan) echo saturating ;; # AVX2 without VNNI
        *) echo exact ;;
    esac
}

work() { # a command that starts Python, of the emulated processor: the tests of $files, or questions
    if [ -n "$asked" ]; then
        ask "$@" > "$asked/there.json"
        PYTHONPATH=$PWD "$python" tests/arithmetic/recorded.py "$asked/here.json" "$asked/there.json"
    else
        "$@" -m pytest "${files[@]}" -q -p no:cacheprovider -p no:xdist -o timeout=1800
    fi 2> >(grep -v "TCG doesn't support requested feature" >&2)
}

ask() { # a command that starts Python
    "$@" cli.py ask scan.png "Is there effusion?" "What modality is used to take this image?" \
        "Which part of the body does this image belong to?" "Is the heart enlarged?" --json
}

on_x86() {
    local name files=(tests/arithmetic)
    for name in "${also[@]}"; do files+=("tests/unit/test_$name.py"); done
    PYTHONPATH=$PWD work qemu-x86_64 -cpu "$1" "$(command -v "$python")"
}

# Debian's packages unpacked beside each other, without a chroot.
fetch_arm64() {
    [ -e "$arm64/done" ] && return
    rm -rf "$arm64"
    mkdir -p "$arm64"/{root/proc,state/lists/partial,cache/archives/partial,uv}
    touch "$arm64/status"
    local apt=(apt-get --quiet=2 -o APT::Architecture=arm64 -o APT::Architectures=arm64
        -o APT::Sandbox::User= -o "Dir::State=$arm64/state" -o "Dir::State::status=$arm64/status"
        -o "Dir::Cache=$arm64/cache")
    "${apt[@]}" update
    "${apt[@]}" install --yes --no-install-recommends --download-only python3 libstdc++6 > /dev/null
    for package in "$arm64"/cache/archives/*.deb; do
        dpkg-deb --extract "$package" "$arm64/root"
    done
    python3 -m venv --without-pip "$arm64/uv"
    python3 -m pip --python "$arm64/uv/bin/python" --disable-pip-version-check install --quiet uv==0.13.9
    "$arm64/uv/bin/uv" pip install --quiet --target "$arm64/site" --constraint lock.txt \
        --python-platform aarch64-manylinux_2_36 --only-binary :all: \
        --python-version "$(basename "$(readlink "$arm64/root/usr/bin/python3")" | tr -d '[:alpha:]')" \
        --requirement pyproject.toml hypothesis onnx pytest pytest-timeout
    touch "$arm64/done"
}

# ONNX Runtime reads what the processor is from here; qemu before 8.1 shows it the machine's own.
cpuinfo() {
    local part features="fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
    case $1 in
        cortex-a72) part=0xd08 ;;
        cortex-a76) part=0xd0b features+=" atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp" ;;
        *) part=0xd40 features+=" atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp sve i8mm bf16" ;;
    esac
    for processor in 0 1; do
        printf 'processor\t: %s\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\n' \
            "$processor" "$features"
        printf 'CPU variant\t: 0x1\nCPU part\t: %s\nCPU revision\t: 1\n\n' "$part"
    done
}

on_arm() {
    local cpu=$1 files=(tests/arithmetic)
    fetch_arm64
    cpuinfo "$cpu" > "$arm64/root/proc/cpuinfo"
    local all=max,pauth-impdef=on,sve-default-vector-length=32 # all features, Neoverse V1's vectors
    case $cpu in
        arm-sme) cpu=$all ;;
        neoverse-v1) qemu-aarch64 -cpu help | grep -q neoverse-v1 || cpu=$all,sme=off ;; # before 8.1
    esac
    PYTHONPATH=$PWD:$arm64/site work qemu-aarch64 -cpu "$cpu" -L "$arm64/root" \
        "$arm64/root/usr/bin/python3"
}

failed=() asked=
case ${1:-} in
    --all) shift && also+=("${all[@]}") ;;
    --few) shift && also=() ;;
    --ask) shift && asked=$(mktemp -d) && trap 'rm -rf "$asked"' EXIT ;;
esac
[ $# -gt 0 ] || set -- "${x86[@]}" "${arm[@]}"
[ -z "$asked" ] || PYTHONPATH=$PWD ask "$python" > "$asked/here.json"
for cpu; do
    echo "== $cpu"
    MEDMOE_EDGE_ARITHMETIC=$(arithmetic "$cpu")
    export MEDMOE_EDGE_ARITHMETIC
    case $cpu in
        cortex-* | neoverse-* | arm-*) on_arm "$cpu" || failed+=("$cpu") ;;
        *) on_x86 "$cpu" || failed+=("$cpu") ;;
    esac
done
[ ${#failed[@]} = 0 ] || { echo "Failed on: ${failed[*]}"; exit 1; }
