/* A layer between a process and its file system, for LD_PRELOAD. It numbers every operation that
 * changes something under a folder, and at one of them kills the process or fails with an errno.
 * It can also keep a journal, from which the state of the disk after a power cut is made: a line an
 * operation, and a copy of each file's content whenever that was put on the disk (fsync, msync).
 *
 * The operations of the main thread and those of all other threads are numbered apart: which of the
 * two comes first changes from run to run. The journal has the order in which they happened.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define LENGTH 4096
#define MAPS 64

static char folder[LENGTH], journal[LENGTH];
static int armed, counters[2], noted, kill_at = -1, fail_at = -1, fail_with, journal_file = -1;
static int in_thread; /* the fault is at an operation of a thread, not of the main one */
static struct { char *begin; size_t length; int file; } maps[MAPS];

void shim_arm(const char *where, int of_thread, int kill_number, int fail_number, int error, const char *journal_folder) {
    strncpy(folder, where, LENGTH - 1);
    kill_at = kill_number;
    fail_at = fail_number;
    fail_with = error;
    in_thread = of_thread;
    counters[0] = counters[1] = noted = 0;
    if (journal_folder && *journal_folder) {
        char path[2 * LENGTH];
        strncpy(journal, journal_folder, LENGTH - 1);
        snprintf(path, sizeof path, "%s/journal", journal);
        journal_file = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND, 0644);
    }
    armed = 1;
}

int shim_count(int of_thread) { return counters[of_thread]; }

static int inside(const char *path) {
    size_t length = strlen(folder);
    return path && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int absolute(int at, const char *path, char *out) {
    if (!path) return 0;
    if (path[0] == '/') { snprintf(out, LENGTH, "%s", path); return inside(out); }
    char link[64], base[LENGTH];
    ssize_t n;
    if (at == AT_FDCWD) n = getcwd(base, LENGTH) ? (ssize_t)strlen(base) : -1;
    else { snprintf(link, sizeof link, "/proc/self/fd/%d", at); n = readlink(link, base, LENGTH - 1); }
    if (n < 0) return 0;
    base[n] = 0;
    snprintf(out, LENGTH, "%.2000s/%.2000s", base, path);
    return inside(out);
}

static int path_of(int file, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = readlink(link, out, LENGTH - 1);
    if (n < 0) return 0;
    out[n] = 0;
    return inside(out);
}

static void note(int number, const char *operation, const char *path, const char *other, long inode, long size) {
    if (journal_file < 0) return;
    char line[3 * LENGTH];
    int n = snprintf(line, sizeof line, "%d\t%s\t%ld\t%ld\t%s\t%s\n", number, operation, inode, size, path, other);
    syscall(SYS_write, journal_file, line, n);
}

/* The place of an operation in the journal before it is done; -1 if it is to fail. */
static int begin(void) {
    int of_thread = syscall(SYS_gettid) != getpid();
    int number = __sync_fetch_and_add(&counters[of_thread], 1);
    if (of_thread == in_thread) {
        if (number == kill_at) { syscall(SYS_kill, getpid(), SIGKILL); for (;;) pause(); }
        if (number == fail_at) { errno = fail_with; return -1; }
    }
    return __sync_fetch_and_add(&noted, 1);
}

static void note_file(int number, const char *operation, int file) {
    char path[LENGTH];
    struct stat status;
    if (journal_file < 0 || !path_of(file, path) || fstat(file, &status)) return;
    note(number, operation, path, "", (long)status.st_ino, (long)status.st_size);
}

static void keep_content(int number, int file) {
    if (journal_file < 0) return;
    char path[2 * LENGTH], buffer[65536];
    struct stat status;
    if (fstat(file, &status) || !S_ISREG(status.st_mode)) return;
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    int in = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY);
    snprintf(path, sizeof path, "%s/%d", journal, number);
    int out = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    ssize_t n;
    while ((n = syscall(SYS_read, in, buffer, sizeof buffer)) > 0) syscall(SYS_write, out, buffer, n);
    syscall(SYS_close, in);
    syscall(SYS_close, out);
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)
#define ON_FILE(type, name, failed, parameters, arguments, before) \
    type name parameters { \
        REAL(type, #name, before); \
        char path[LENGTH]; \
        if (!armed || file < 3 || file == journal_file || !path_of(file, path)) return real arguments; \
        int number = begin(); \
        if (number < 0) return failed; \
        type result = real arguments; \
        note_file(number, "write", file); \
        return result; \
    }
#define COMMA ,
ON_FILE(ssize_t, write, -1, (int file, const void *data, size_t n), (file, data, n), int COMMA const void * COMMA size_t)
ON_FILE(ssize_t, pwrite, -1, (int file, const void *data, size_t n, off_t at), (file, data, n, at), int COMMA const void * COMMA size_t COMMA off_t)
ON_FILE(ssize_t, pwrite64, -1, (int file, const void *data, size_t n, off_t at), (file, data, n, at), int COMMA const void * COMMA size_t COMMA off_t)
ON_FILE(ssize_t, writev, -1, (int file, const struct iovec *data, int n), (file, data, n), int COMMA const struct iovec * COMMA int)
ON_FILE(int, ftruncate, -1, (int file, off_t size), (file, size), int COMMA off_t)
ON_FILE(int, ftruncate64, -1, (int file, off_t size), (file, size), int COMMA off_t)

static int synced(int (*real)(int), int file) {
    char path[LENGTH];
    if (!armed || !path_of(file, path)) return real(file);
    int number = begin();
    if (number < 0) return -1;
    int result = real(file);
    keep_content(number, file);
    note_file(number, "sync", file);
    return result;
}
int fsync(int file) { REAL(int, "fsync", int); return synced(real, file); }
int fdatasync(int file) { REAL(int, "fdatasync", int); return synced(real, file); }

static void *mapped(void *result, size_t length, int protection, int flags, int file) {
    char path[LENGTH];
    if (armed && result != MAP_FAILED && file >= 0 && (flags & MAP_SHARED) && (protection & PROT_WRITE) && path_of(file, path))
        for (int i = 0; i < MAPS; i++)
            if (!maps[i].begin) {
                maps[i].begin = result;
                maps[i].length = length;
                maps[i].file = fcntl(file, F_DUPFD_CLOEXEC, 100);
                break;
            }
    return result;
}
void *mmap(void *at, size_t length, int protection, int flags, int file, off_t offset) {
    REAL(void *, "mmap", void *, size_t, int, int, int, off_t);
    return mapped(real(at, length, protection, flags, file, offset), length, protection, flags, file);
}
void *mmap64(void *at, size_t length, int protection, int flags, int file, off_t offset) {
    REAL(void *, "mmap64", void *, size_t, int, int, int, off_t);
    return mapped(real(at, length, protection, flags, file, offset), length, protection, flags, file);
}
int munmap(void *at, size_t length) {
    REAL(int, "munmap", void *, size_t);
    for (int i = 0; armed && i < MAPS; i++)
        if (maps[i].begin == at) { maps[i].begin = NULL; syscall(SYS_close, maps[i].file); }
    return real(at, length);
}
int msync(void *at, size_t length, int flags) {
    REAL(int, "msync", void *, size_t, int);
    for (int i = 0; armed && i < MAPS; i++)
        if (maps[i].begin && maps[i].begin <= (char *)at && (char *)at < maps[i].begin + maps[i].length) {
            int number = begin();
            if (number < 0) return -1;
            int result = real(at, length, flags);
            keep_content(number, maps[i].file);
            note_file(number, "sync", maps[i].file);
            return result;
        }
    return real(at, length, flags);
}

static int renamed(int from_at, const char *from, int to_at, const char *to, int (*real)(int, const char *, int, const char *)) {
    char a[LENGTH], b[LENGTH];
    int is_ours = armed ? absolute(from_at, from, a) | absolute(to_at, to, b) : 0;
    if (!is_ours) return real(from_at, from, to_at, to);
    int number = begin();
    if (number < 0) return -1;
    int result = real(from_at, from, to_at, to);
    if (!result) note(number, "rename", a, b, 0, 0);
    return result;
}
int renameat(int from_at, const char *from, int to_at, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    return renamed(from_at, from, to_at, to, real);
}
int rename(const char *from, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    return renamed(AT_FDCWD, from, AT_FDCWD, to, real);
}

static int removed(int at, const char *path, int flags, int (*real)(int, const char *, int)) {
    char a[LENGTH];
    if (!armed || !absolute(at, path, a)) return real(at, path, flags);
    int number = begin();
    if (number < 0) return -1;
    int result = real(at, path, flags);
    if (!result) note(number, "remove", a, "", 0, 0);
    return result;
}
int unlinkat(int at, const char *path, int flags) { REAL(int, "unlinkat", int, const char *, int); return removed(at, path, flags, real); }
int unlink(const char *path) { REAL(int, "unlinkat", int, const char *, int); return removed(AT_FDCWD, path, 0, real); }
int rmdir(const char *path) { REAL(int, "unlinkat", int, const char *, int); return removed(AT_FDCWD, path, AT_REMOVEDIR, real); }

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    char a[LENGTH];
    struct stat status;
    if (!armed || !absolute(AT_FDCWD, path, a) || !stat(a, &status)) return real(path, mode);
    int number = begin();
    if (number < 0) return -1;
    int result = real(path, mode);
    if (!result) note(number, "mkdir", a, "", 0, 0);
    return result;
}

/* Opening counts where it makes or empties a file. */
static int opened(int at, const char *path, int flags, mode_t mode, int (*real)(int, const char *, int, ...)) {
    char a[LENGTH];
    struct stat status;
    if (!armed || !(flags & (O_CREAT | O_TRUNC)) || !absolute(at, path, a)) return real(at, path, flags, mode);
    if (!stat(a, &status) && !(flags & O_TRUNC)) return real(at, path, flags, mode);
    int number = begin();
    if (number < 0) return -1;
    int result = real(at, path, flags, mode);
    if (result >= 0) note_file(number, "open", result);
    return result;
}
#define MODE mode_t mode = 0; if (flags & O_CREAT) { va_list list; va_start(list, flags); mode = va_arg(list, int); va_end(list); }
int openat(int at, const char *path, int flags, ...) { REAL(int, "openat", int, const char *, int, ...); MODE return opened(at, path, flags, mode, real); }
int openat64(int at, const char *path, int flags, ...) { REAL(int, "openat", int, const char *, int, ...); MODE return opened(at, path, flags, mode, real); }
int open(const char *path, int flags, ...) { REAL(int, "openat", int, const char *, int, ...); MODE return opened(AT_FDCWD, path, flags, mode, real); }
int open64(const char *path, int flags, ...) { REAL(int, "openat", int, const char *, int, ...); MODE return opened(AT_FDCWD, path, flags, mode, real); }
