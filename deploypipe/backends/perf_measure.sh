# Time ONNX models in turns with ONNX Runtime's own onnxruntime_perf_test, which lies beside this script with the models.
# $1: turns, $2: runs of each turn, $3: threads, then the models' files. Leaves facts.txt, one `name<TAB>value` a line, and
# times-MODEL.csv for each, one line a run. Needs nothing but a shell.
turns=$1
runs=$2
threads=$3
shift 3
say() { [ -z "$2" ] || printf '%s\t%s\n' "$1" "$2"; }

{
    say arch "$(uname -m)"
    say cpu "$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo 2> /dev/null | head -n 1)"
    # Cores of ARM have no name, only numbers of maker and design; a device may have several designs.
    say cpu "$(sed -n 's/^CPU implementer[[:space:]]*: //p; s/^CPU part[[:space:]]*: //p' /proc/cpuinfo 2> /dev/null | sort -u | tr '\n' ' ')"
    say cpu "$(uname -m)"
    say cpu_flags "$(sed -n 's/^flags[[:space:]]*: //p; s/^Features[[:space:]]*: //p' /proc/cpuinfo 2> /dev/null | head -n 1)"
    say governor "$(cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor 2> /dev/null)"
} > facts.txt

turn=0
while [ "$turn" -lt "$turns" ]; do
    for model in "$@"; do
        # Inputs are made up (-I) from a seed (-S): without one they are whatever lies in memory. The file is appended to.
        ./onnxruntime_perf_test -e cpu -I -S 1 -m times -r "$runs" -x "$threads" -y 1 -o 99 "$model" "times-$model.csv"
        code=$?
        if [ "$code" -eq 255 ]; then # its only failure, and what a lost connection looks like
            exit 1
        elif [ "$code" -ne 0 ]; then
            exit "$code"
        fi
    done
    turn=$((turn + 1))
done
