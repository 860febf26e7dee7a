#!/bin/busybox sh
# The guest's first and only program: drives the disk and prints what it saw in
# lines `RINGFENCE key=value`. console.rs reads them, and image.rs knows what the
# disk holds in the end.

/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run

# By way of the kernel, which writes to its console also where interrupts do not arrive.
tell() { echo "<1>RINGFENCE $1=$2" >/dev/kmsg; }
finish() {
    tell end "$1"
    # A power-off waits for a driver whose device is silent; an emergency restart
    # waits for nobody, and QEMU ends at it as well.
    [ "$1" = done ] && poweroff -f || echo b >/proc/sysrq-trigger
    sleep 60 # either can take a moment; an init that ends is a panic
}

tell kernel "$(uname -r)"
while read -r range _ kind; do
    [ "$kind" = "System RAM" ] && tell ram "$range"
done </proc/iomem

# The disk's driver reads the partition table before its insmod returns, and
# waits for ever where a device does not answer: so all of it runs beside us.
(
    for module in /modules/*.ko; do
        # Its options on the kernel's command line, as modprobe would pass them: `name.option=value`.
        name=${module##*/[0-9][0-9]-} options=
        for word in $(cat /proc/cmdline); do
            [ "${word#"${name%.ko}".}" != "$word" ] && options="$options ${word#*.}"
        done
        insmod "$module" $options || tell error "cannot load $module"
    done
    : >/run/loaded
    until [ -b /dev/vda ]; do sleep 0.1; done
    dd if=/dev/vda of=/dev/null bs=4096 count=1 iflag=direct 2>/run/first && : >/run/ready
) &

describe() {
    for device in /sys/bus/virtio/devices/*; do
        [ "$(cat "$device/device" 2>/dev/null)" = 0x0002 ] || continue
        tell features "$(cat "$device/features")"
        tell status "$(cat "$device/status")"
        function=$(readlink -f "$device/..")
        [ -e "$function/iommu_group/type" ] && tell group "$(cat "$function/iommu_group/type")"
    done
}

# A driver that gave up has set FAILED, 0x80, and one that has started the device DRIVER_OK, 4. The device's first
# answer may then take 20 s: an emulated CPU on a busy machine is slow, and a back-end that refuses leaves no other
# trace than silence.
failed() { [ -e /run/loaded ] && grep -q '0x000000[89a-f].' /sys/bus/virtio/devices/*/status; }
started() { grep -q '0x000000.[4-7c-f]' /sys/bus/virtio/devices/*/status 2>/dev/null; }
uptime() { read -r now _ </proc/uptime && now=${now%.*}; }
uptime
deadline=$((now + 20))
told=
until [ -e /run/ready ] || [ "$now" -ge $deadline ] || failed; do
    sleep 0.1
    uptime
    if [ -z "$told" ] && started; then
        told=1
        describe
        tell started "$now"
    fi
done
describe

if [ ! -e /run/ready ]; then
    if [ -b /dev/vda ]; then
        tell disk stuck
        # What a device does that has lost its way shows when it is asked more often.
        for try in 1 2 3; do
            dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null &
            sleep 1
        done
    else
        tell disk absent
    fi
    [ -s /run/first ] && tell error "$(tr '\n ' '; ' </run/first)"
    finish refused
fi
tell disk ready

digest() { dd if=/dev/vda bs="$1" iflag=direct 2>/run/error | sha256sum | cut -d' ' -f1; }

tell read "$(digest 1M)"

# The second half becomes the first, moved down by a MiB; the MiB that falls off
# goes to the end, in small pieces.
half=$(($(cat /sys/block/vda/size) / 4096)) # in MiB
copy() {
    dd if=/dev/vda of=/dev/vda "$@" iflag=direct oflag=direct conv=fsync,notrunc 2>/run/error && return
    tell error "$(tr '\n ' '; ' </run/error)"
    finish failed
}
copy bs=1M skip=1 seek=$half count=$((half - 1))
copy bs=4k skip=0 seek=$(((2 * half - 1) * 256)) count=256
sync
echo 3 >/proc/sys/vm/drop_caches
tell written "$(digest 256k)"
[ -e /then.sh ] && . /then.sh
finish done
