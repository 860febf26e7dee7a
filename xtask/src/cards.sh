# What follows when the disk of `init.sh` is verified: what its functions look like, and what they do.

asked() { grep -q "ringfence\.$1" /proc/cmdline; }
random() { dd if=/dev/hwrng bs=32 count=1 2>/dev/null | hexdump -v -e '32/1 "%02x"'; }
load() {
    while [ ! -e /run/enough ]; do
        dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/run/load || return
    done
    : >/run/unharmed
}
has_random() { grep -q virtio_rng /sys/class/misc/hw_random/rng_available; }

if asked plug; then
    load &
    tell load runs
    until has_random; do sleep 0.1; done
    tell random "$(random) $(random)"
    while has_random; do sleep 0.1; done
    : >/run/enough
    wait
    [ -e /run/unharmed ] || finish failed
    tell unplugged done
    finish done
fi
if asked kill; then
    tell load runs
    load
    tell lost "$(tr '\n ' '; ' </run/load)"
    finish done
fi

# A queue for each processor.
for processor in $(seq 0 $(($(nproc) - 1))); do
    taskset -c $processor dd if=/dev/vda of=/dev/null bs=4k count=16 skip=$processor iflag=direct 2>/run/error ||
        tell error "$(tr '\n ' '; ' </run/error)"
done
tell random "$(random) $(random)"
for device in /sys/bus/virtio/devices/*; do
    function=$(readlink -f "$device/..")
    slot=${function##*/0000:}
    tell function "$slot type=$(cat "$device/device") features=$(cat "$device/features") irq=$(cat "$function/irq")"
    hexdump -v -e '64/1 "%02x" "\n"' "$function/config" | while read -r bytes; do tell config "$slot $bytes"; done
done
grep virtio /proc/interrupts | while read -r interrupt; do tell interrupt "$interrupt"; done
