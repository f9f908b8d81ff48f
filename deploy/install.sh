#!/usr/bin/env bash
# Installs sage-fed as a service on a Jetson (JetPack 7: Ubuntu 24.04, Python 3.12, CUDA 13).
#
#   sudo deploy/install.sh [--check] [WHEEL]
#
# WHEEL is sage-fed's wheel; without it the checkout that this script lies in is installed.
# --check looks at the machine and changes nothing. What is wrong is said with what to do about it;
# what only costs speed is a warning. Running it again upgrades. docs/jetson.md has the whole story.
set -euo pipefail

readonly PREFIX=/opt/sage-fed
# Jetson Thor is sm_110: only CUDA 13 wheels carry code for it. A cu128 wheel installs, and runs
# no operation.
readonly TORCH_INDEX=${SAGE_FED_TORCH_INDEX:-https://download.pytorch.org/whl/cu130}
readonly PYTHON=${PYTHON:-python3.12}

problems=0
say() { printf '%s\n' "$*"; }
good() { printf '  ok       %s\n' "$*"; }
warn() { printf '  slower   %s\n' "$*"; }
bad() {
  printf '  missing  %s\n' "$*"
  problems=$((problems + 1))
}

check_machine() {
  say "the machine:"
  if [[ $(uname -m) == aarch64 ]]; then good "aarch64"; else
    bad "this is $(uname -m), a Jetson is aarch64; elsewhere: pip install, then sage-fed install-service"
  fi
  local release='' version=''
  if [[ -r /etc/os-release ]]; then
    # shellcheck disable=SC1091 # the machine's own
    release=$(. /etc/os-release && printf '%s' "${ID:-} ${VERSION_ID:-}")
  fi
  if [[ $release == 'ubuntu 24.04' ]]; then good "Ubuntu 24.04"; else
    bad "JetPack 7 is Ubuntu 24.04, this is ${release:-unknown}; flash JetPack 7"
  fi
  if [[ -r /etc/nv_tegra_release ]]; then
    version=$(sed -n 's/^# R\([0-9]*\).*/\1/p' /etc/nv_tegra_release)
  fi
  if [[ -n $version && $version -ge 38 ]]; then good "Jetson Linux R$version"; else
    bad "Jetson Linux R38 or newer (JetPack 7), found ${version:-none}"
  fi
  if "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
    good "$("$PYTHON" --version)"
    if "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then good "venv"; else
      bad "Python's venv; apt-get install python3.12-venv"
    fi
  else
    bad "$PYTHON; apt-get install python3.12 python3.12-venv"
  fi
  if [[ -e /dev/nvidia0 || -e /dev/nvgpu/igpu0 || -e /dev/nvmap ]]; then good "GPU device nodes"; else
    bad "no GPU device nodes; is the driver loaded? see dmesg | grep -i nv"
  fi
  if command -v systemctl >/dev/null; then
    good "systemd $(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')"
  else
    bad "systemd"
  fi
}

check_speed() {
  say "its speed:"
  local mode=''
  if command -v nvpmodel >/dev/null; then
    mode=$(nvpmodel -q 2>/dev/null | sed -n 's/^NV Power Mode: *//p')
  fi
  case $mode in
    MAXN*) good "power mode $mode" ;;
    '') warn "the power mode is unknown (nvpmodel -q says nothing)" ;;
    *) warn "power mode $mode; nvpmodel -m 0 is MAXN, and a rate card belongs to one mode" ;;
  esac
  if command -v jetson_clocks >/dev/null; then
    if jetson_clocks --show 2>/dev/null | grep -Eq 'GPU.*MinFreq=([0-9]+) MaxFreq=\1 '; then
      good "the clocks are fixed"
    else
      warn "the clocks float; jetson_clocks fixes them, until the next boot"
    fi
  else
    warn "there is no jetson_clocks"
  fi
  if [[ -n $(swapon --noheadings --show=NAME 2>/dev/null | grep -v zram || true) ]]; then
    warn "there is swap on a disk; a model that is swapped out stalls everything: swapoff"
  fi
}

check_room() {
  say "its room:"
  local free_gb memory_gb
  free_gb=$(df --output=avail -BG /opt | tail -n 1 | tr -dc '0-9')
  if ((free_gb >= 12)); then good "$free_gb GB free below /opt"; else
    bad "12 GB below /opt for PyTorch and CUDA's libraries, there are $free_gb"
  fi
  memory_gb=$(($(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo) / 1000000))
  if ((memory_gb >= 56)); then good "$memory_gb GB of memory available"; else
    bad "the profile jetson-thor takes about 50 GB, $memory_gb are available; docs/jetson.md has smaller budgets"
  fi
}

install_package() {
  local source=$1
  say "installing into $PREFIX"
  "$PYTHON" -m venv "$PREFIX"
  "$PREFIX/bin/pip" install --quiet --upgrade pip
  "$PREFIX/bin/pip" install --quiet --index-url "$TORCH_INDEX" 'torch>=2.9'
  "$PREFIX/bin/pip" install --quiet --upgrade "$source"
  # Here, once: a service may not write bytecode, and would compile everything at each start.
  "$PREFIX/bin/python" -m compileall -q "$PREFIX/lib" || true
  chmod -R go+rX "$PREFIX"
  ln -sf "$PREFIX/bin/sage-fed" /usr/local/bin/sage-fed
  "$PREFIX/bin/python" - <<'python'
import sys
import torch

if not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device; is this a CUDA 13 build for aarch64?")
major, minor = torch.cuda.get_device_capability()
# One real operation: a wheel without code for this device fails here, and not at the first job.
torch.ones(64, 64, device="cuda", dtype=torch.bfloat16).matmul(
    torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
).sum().item()
print(f"  ok       torch {torch.__version__} computes on sm_{major}{minor}")
python
}

main() {
  local check_only='' source
  if [[ ${1:-} == --check ]]; then
    check_only=1
    shift
  fi
  source=${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
  check_machine
  check_speed
  check_room
  if ((problems)); then
    say "$problems missing; nothing was changed"
    exit 1
  fi
  if [[ -n $check_only ]]; then
    say "this machine can run sage-fed"
    exit 0
  fi
  if ((EUID)); then
    say "installing needs root: sudo $0"
    exit 1
  fi
  install_package "$source"
  "$PREFIX/bin/sage-fed" install-service --machine jetson
  say ""
  say "the weights (16 GB) come at the first start, or beforehand, from a machine with a network:"
  say "  see \"The weights\" in docs/jetson.md"
}

main "$@"
