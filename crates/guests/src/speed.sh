#!/bin/busybox sh
# A guest that measures two disks in turn, and prints `RINGFENCE speed=ROUND DISK LOAD REQUESTS SECONDS`. The disk in
# slot 4 is QEMU's own, the one in slot 5 is a back-end's. `rounds`, `seconds`, and `load` if there is
# to be but one are on the kernel's command line.

/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
echo 1 >/proc/sys/kernel/printk

finish() {
    echo "RINGFENCE end=$1" >/dev/console
    poweroff -f
    sleep 60
}

for word in $(cat /proc/cmdline); do
    case $word in ringfence.rounds=* | ringfence.seconds=* | ringfence.load=*) eval "${word#ringfence.}" ;; esac
done
for module in /modules/*.ko; do insmod "$module" || finish "cannot load $module"; done

# The name of the disk in slot $1.
disk() {
    for try in $(seq 100); do
        for name in /sys/block/vd*; do
            case $(readlink -f "$name/device") in */0000:00:0$1.0/*) echo "/dev/${name##*/}" && return ;; esac
        done
        sleep 0.1
    done
}
own=$(disk 4) other=$(disk 5)
[ -b "$own" ] && [ -b "$other" ] || finish "no disks"

random() {
    /bin/load "$1" "$2" "$3" "$4" "$seconds" || finish failed
}
# A number of blocks by busybox' dd, past the cache.
copy() {
    run="/bin/load run dd bs=$3 count=$4"
    case $2 in
    read) took=$($run if="$1" of=/dev/null iflag=direct) || finish failed ;;
    write) took=$($run if=/dev/zero of="$1" oflag=direct conv=notrunc) || finish failed ;;
    # As most programs read: by way of the cache, which reads ahead.
    cached)
        echo 3 >/proc/sys/vm/drop_caches
        took=$($run if="$1" of=/dev/null) || finish failed
        ;;
    esac
    echo "$4 $took"
}
measure() { echo "RINGFENCE speed=$round $1 $3 $("$4" "$2" "$5" "$6" "$7")"; }
both() {
    [ -z "$load" ] || [ "$load" = "$1" ] || return
    if [ $((round % 2)) = 0 ]; then
        measure own "$own" "$@" && measure other "$other" "$@"
    else
        measure other "$other" "$@" && measure own "$own" "$@"
    fi
}

# The first round warms up, and is not told.
round=0
while [ $round -le "$rounds" ]; do
    both dd-read-1M copy read 1M 128
    both dd-write-1M copy write 1M 128
    both dd-read-4k copy read 4k 2000
    both dd-cached-read copy cached 1M 128
    both read-4k-QD1 random read 4096 1
    both read-4k-QD16 random read 4096 16
    both write-4k-QD16 random write 4096 16
    both read-64k-QD4 random read 65536 4
    round=$((round + 1))
done
finish done
