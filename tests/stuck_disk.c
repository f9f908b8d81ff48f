/* Preloaded into a daemon: syncing a file hangs for as long as the file $STUCK_WHILE is there. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static void hang(void) {
  const char *name = getenv("STUCK_WHILE");
  while (name && access(name, F_OK) == 0) usleep(5000);
}

int fsync(int fd) {
  hang();
  return syscall(SYS_fsync, fd);
}

int fdatasync(int fd) {
  hang();
  return syscall(SYS_fdatasync, fd);
}
