# What a device is and how it is set: one `name<TAB>value` a line, whatever is not there left out. $1: the Python interpreter, then its packages.
python=$1
shift
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
tab=$(printf '\t')
say() { [ -z "$2" ] || printf '%s\t%s\n' "$1" "$2"; }
each() { while IFS= read -r line; do say "$1" "$line"; done; }
has() { command -v "$1" > /dev/null 2>&1; }
prop() { has getprop && getprop "$1"; }
text() { [ -r "$1" ] && tr '\000' '\n' < "$1" 2> /dev/null; }

say arch "$(uname -m)"
say kernel "$(uname -sr)"
say os "$(sed -n 's/^PRETTY_NAME=//p' /etc/os-release 2> /dev/null | tr -d '"')"
release=$(prop ro.build.version.release)
[ -z "$release" ] || say os "Android $release"

say model "$(text /proc/device-tree/model | head -n 1)"
say model "$(prop ro.product.model)"
say model "$(text /sys/class/dmi/id/product_name)"
say soc "$(text /proc/device-tree/compatible | tail -n 1)"
say soc "$(prop ro.soc.model)"

# Cores of ARM have no name, only numbers of maker and design; a device may have several designs.
say cpu "$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo 2> /dev/null | head -n 1)"
say cpu "$(sed -n 's/^CPU implementer[[:space:]]*: //p; s/^CPU part[[:space:]]*: //p' /proc/cpuinfo 2> /dev/null | sort -u | tr '\n' ' ')"
say cpu_flags "$(sed -n 's/^flags[[:space:]]*: //p; s/^Features[[:space:]]*: //p' /proc/cpuinfo 2> /dev/null | head -n 1)"
# nproc counts what OMP_NUM_THREADS says, but Android has no other.
say cores "$(getconf _NPROCESSORS_ONLN 2> /dev/null || nproc 2> /dev/null)"
say memory_kib "$(sed -n 's/^MemTotal:[[:space:]]*\([0-9]*\).*/\1/p' /proc/meminfo 2> /dev/null)"
say free_kib "$(df -Pk . 2> /dev/null | sed -n '2s/.*[[:space:]]\([0-9][0-9]*\)[[:space:]][[:space:]]*[0-9]*%.*/\1/p')"

cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor 2> /dev/null | sort -u | each governor
cat /sys/class/thermal/thermal_zone*/temp 2> /dev/null | each temperature_milli_c
if has nvpmodel; then
    nvpmodel -q 2> /dev/null | sed -n 's/^NV Power Mode: *//p' | each power_mode
fi
if has jetson_clocks; then
    clocks=$(jetson_clocks --show 2> /dev/null) && printf '%s\n' "$clocks" | each clocks
fi

if has dpkg-query; then
    dpkg-query -W -f '${Package}\t${Version}\t${Status}\n' 'libnvinfer[0-9]*' libnvinfer-bin nvidia-jetpack 'libcudnn[0-9]*' 2> /dev/null |
        sed -n "s/${tab}[^${tab}]* installed\$//p" | each package
fi
if has "$python"; then
    say interpreter "$("$python" -c 'import platform, sys; print(platform.python_version(), sys.executable, sep="\t")' 2> /dev/null)"
    "$python" -c '
from importlib.metadata import distributions
import sys
found = {(d.metadata["Name"] or "").lower(): d.version for d in distributions()}
for name in sys.argv[1:]:
    if name in found:
        print(name, found[name], sep="\t")
' "$@" 2> /dev/null | each package
fi
exit 0
