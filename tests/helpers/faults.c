/* Makes one write, fsync or rename below a directory fail: the n-th, with an error of choice.

   Loaded with LD_PRELOAD; armed from Python through ctypes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long fail_at = -1, calls = 0;
static int error_code = 0;
static char below[PATH_MAX] = "";
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void fault_arm(long number, int code, const char *folder) {
    snprintf(below, sizeof below, "%s", folder);
    fail_at = number;
    error_code = code;
    calls = 0;
}

long fault_calls(void) { return calls; }

static int hit(const char *path) {
    int failing;
    if (fail_at < 0 || !below[0] || strncmp(path, below, strlen(below)) != 0) return 0;
    pthread_mutex_lock(&lock);
    failing = ++calls == fail_at;
    pthread_mutex_unlock(&lock);
    if (failing) errno = error_code;
    return failing;
}

static int hit_descriptor(int descriptor) {
    char link[64], path[PATH_MAX];
    ssize_t length;
    if (fail_at < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return hit(path);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    return hit_descriptor(fd) ? -1 : real(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    return hit_descriptor(fd) ? -1 : real(fd, parts, count);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64);
    return hit_descriptor(fd) ? -1 : real(fd, data, size, offset);
}
int fsync(int fd) {
    REAL(fsync);
    return hit_descriptor(fd) ? -1 : real(fd);
}
int fdatasync(int fd) {
    REAL(fdatasync);
    return hit_descriptor(fd) ? -1 : real(fd);
}
int rename(const char *from, const char *to) {
    REAL(rename);
    return hit(to) ? -1 : real(from, to);
}
int link(const char *from, const char *to) {
    REAL(link);
    return hit(to) ? -1 : real(from, to);
}
