#!/usr/bin/env bash
# Becomes a machine with a systemd of its own: PID 1 in fresh namespaces, on an overlay of this
# machine's files that forgets everything. Called by systemd_machine.py inside `unshare`.
#   $1 an empty directory   $2 folders for the site-packages, highest first, with colons
#   $3 the interpreter's prefix   $4 its name, such as python3.11
set -euo pipefail
work=$1 site=$2 prefix=$3 python=$4

mount -t tmpfs -o mode=0755 machine "$work"
mkdir "$work/upper" "$work/work" "$work/root"
mount -t overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/work" machine "$work/root"
root=$work/root

# The installation under test, with the interpreter of the tests, both where a service can reach.
packages=$root/opt/sage-fed/lib/$python/site-packages
rm -rf "$root/opt/sage-fed"
mkdir -p "$packages" "$root/opt/sage-fed/bin" "$root/opt/python"
mount -t overlay -o "ro,lowerdir=$site" packages "$packages"
mount --bind "$prefix" "$root/opt/python"
ln -s "/opt/python/bin/$python" "$root/opt/sage-fed/bin/python"
# An interpreter with a shared library looks for it where it was built, which may be a home.
echo /opt/python/lib > "$root/etc/ld.so.conf.d/opt-python.conf"
ldconfig -r "$root" -X
printf 'home = /opt/python/bin\n' > "$root/opt/sage-fed/pyvenv.cfg"
cat > "$root/opt/sage-fed/bin/sage-fed" <<'script'
#!/opt/sage-fed/bin/python
from sage_fed.cli import main
main()
script
chmod 755 "$root/opt/sage-fed/bin/sage-fed"

# Devices: the usual ones, and a GPU that has a node and no driver.
mount -t tmpfs -o mode=0755 dev "$root/dev"
while read -r name major minor; do
  mknod -m 666 "$root/dev/$name" c "$major" "$minor"
done <<'nodes'
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
console 1 3
nodes
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for group in video render; do
  grep -q "^$group:" "$root/etc/group" || groupadd --root "$root" --system "$group"
done
mknod -m 660 "$root/dev/nvidia0" c 195 0
chgrp "$(grep ^video: "$root/etc/group" | cut -d: -f3)" "$root/dev/nvidia0"

mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=0755 run "$root/run"

# Only what the service needs: nothing that this machine has enabled, nothing that touches hardware.
system=$root/etc/systemd/system
rm -rf "$system"
mkdir -p "$system"
ln -s /lib/systemd/system/basic.target "$system/default.target"
for unit in systemd-udevd.service systemd-udev-trigger.service systemd-udevd-control.socket \
  systemd-udevd-kernel.socket systemd-tmpfiles-setup.service systemd-tmpfiles-setup-dev.service \
  systemd-sysusers.service systemd-update-utmp.service systemd-random-seed.service \
  systemd-binfmt.service systemd-sysctl.service systemd-modules-load.service \
  systemd-remount-fs.service systemd-journal-flush.service systemd-pstore.service \
  systemd-networkd.service systemd-resolved.service systemd-timesyncd.service \
  systemd-firstboot.service systemd-machine-id-commit.service dev-hugepages.mount \
  dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount \
  sys-fs-fuse-connections.mount proc-sys-fs-binfmt_misc.automount timers.target \
  paths.target ldconfig.service kmod-static-nodes.service; do
  ln -s /dev/null "$system/$unit"
done
mkdir -p "$root/var/log" && rm -rf "$root/var/log/journal"
: > "$root/etc/fstab"

cd "$root"
mkdir -p .old
pivot_root . .old
umount --lazy /.old
rmdir /.old
# As a container manager does it: systemd hands credentials over by mounts that propagate.
mount --make-rshared /
exec /usr/bin/env -i container=sage-fed-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
  /lib/systemd/systemd --system --show-status=no --log-target=journal
