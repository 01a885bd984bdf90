/* What stands between a process under test and the kernel: LD_PRELOAD this, then arm it.

   Every write-side call below one directory is counted, over all threads. At the call that was
   chosen the process is killed, or the call fails, is cut short, or lies; or every call is recorded
   with its data, so that what a power cut may leave can be built afterwards. The READ modes count
   what opens, reads and lists instead. A process that has not armed it pays one comparison a call.
   The fault matrix arms it by a call (tests/faults/inject.py). A proof of somebody's script arms it
   by the environment, to record (recorder.py). */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, KILL, KILL_HALF, FAIL, FAIL_FROM, SHORT, LIE, DROP, RECORD,
       COUNT_READ, FAIL_READ, FAIL_READ_FROM };

static volatile int mode = OFF;
static char root[4096];
static size_t root_length;
static long chosen, seen, fired;
static int error_number, log_fd = -1;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static int by_environment; /* several processes may share the log, and output is noted in it */
static long long room = 1LL << 29; /* bytes that the log of a script may take */

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);
    if (!found)
        abort();
    return found;
}

/* ---------------------------------------------------------------- what arms it */

void fault_arm(int how, const char *directory, long nth, int number, int log)
{
    snprintf(root, sizeof root, "%s", directory);
    root_length = strlen(root);
    chosen = nth, error_number = number, log_fd = log, seen = 0, fired = 0;
    mode = how;
}

void fault_disarm(void) { mode = OFF; }

__attribute__((constructor)) static void arm_by_environment(void)
{
    const char *directory = getenv("HOLDFAST_RECORD"), *log = getenv("HOLDFAST_RECORD_LOG");
    if (!directory || !log)
        return;
    int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return;
    int high = fcntl(fd, F_DUPFD_CLOEXEC, 200); /* the script finds the numbers that it expects */
    by_environment = 1;
    fault_arm(RECORD, directory, 0, 0, high < 0 ? fd : high);
}

long fault_seen(void) { return seen; }
long fault_fired(void) { return fired; }

/* ------------------------------------------------------------------------------ which calls count */

static int below(const char *path)
{
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || !path[root_length]);
}

static int path_of(int fd, char *out)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, out, 4095);
    if (length < 0)
        return 0;
    out[length] = 0;
    return 1;
}

/* The absolute form of what was passed to an ...at call. */
static void absolute(int dirfd, const char *path, char *out)
{
    char base[4096] = "";
    if (path[0] != '/') {
        if (dirfd == AT_FDCWD)
            syscall(SYS_getcwd, base, sizeof base);
        else
            path_of(dirfd, base);
        if (base[0])
            strcat(base, "/");
    }
    snprintf(out, 4096, "%.2000s%.2000s", base, path);
}

static void put(const char *text, size_t length)
{
    while (length) {
        ssize_t n = syscall(SYS_write, log_fd, text, length);
        if (n <= 0)
            return;
        text += n, length -= n;
    }
}

/* One line a call: number, thread, name, inode, offset, bytes of data that follow, path, other. */
static void note(const char *name, unsigned long inode, long long offset, size_t bytes,
                 const char *path, const char *other)
{
    char line[9000];
    int n = snprintf(line, sizeof line, "%ld\t%ld\t%s\t%lu\t%lld\t%zu\t%s\t%s\n", seen,
                     (long)syscall(SYS_gettid), name, inode, offset, bytes, path, other);
    put(line, n);
}

/* Hold the turn over call and note, so that the log is in the order of effects. */
static void take_turn(void)
{
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    pthread_mutex_lock(&turn);
    while (by_environment && fcntl(log_fd, F_SETLKW, &whole) && errno == EINTR)
        ;
}

static void give_turn(void)
{
    struct flock whole = {.l_type = F_UNLCK, .l_whence = SEEK_SET};
    if (by_environment)
        fcntl(log_fd, F_SETLK, &whole);
    pthread_mutex_unlock(&turn);
}

static void die(void)
{
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;)
        pause();
}

/* An announcement that has been read: a power cut after this line must not take it back. */
void fault_mark(const char *said)
{
    if (mode != RECORD)
        return;
    pthread_mutex_lock(&turn);
    note("said", 0, 0, 0, said, "");
    pthread_mutex_unlock(&turn);
}

enum { GO, STOP, HALF, FLIP, KEEP_NOTHING };

/* Count a call and say what is to become of it. What was chosen is logged before it happens. */
static int enter(const char *name, const char *path, int writes)
{
    int verdict = GO;
    if (mode >= COUNT_READ)
        return GO;
    pthread_mutex_lock(&turn);
    seen++;
    int now = seen == chosen || (mode == FAIL_FROM && seen >= chosen);
    int fits = writes || (mode != KILL_HALF && mode != SHORT && mode != LIE && mode != DROP);
    if (mode >= KILL && mode < RECORD && now && fits) {
        if (!fired)
            note(name, 0, 0, 0, path, "fired");
        fired++;
        if (mode == KILL)
            die();
        if (mode == FAIL || mode == FAIL_FROM)
            errno = error_number, verdict = STOP;
        if (mode == SHORT || mode == KILL_HALF)
            verdict = HALF;
        if (mode == LIE)
            verdict = FLIP;
        if (mode == DROP)
            verdict = KEEP_NOTHING;
    } else if (mode == COUNT) {
        note(name, 0, 0, 0, path, "");
    }
    pthread_mutex_unlock(&turn);
    return verdict;
}

static dev_t broken_device;
static ino_t broken_inode; /* what the first failed call was about */

/* Count a read-side call; whether it fails. A shortage of the process (descriptors, memory) lasts for
   every file, an error of the disk for this one. Python itself repeats what EINTR has ended. */
static int refused(const char *name, const char *path, const struct stat *what)
{
    int fails = 0;
    if (!below(path))
        return 0;
    pthread_mutex_lock(&turn);
    seen++;
    if (mode == COUNT_READ)
        note(name, 0, 0, 0, path, "");
    int shortage = error_number == EMFILE || error_number == ENOMEM || error_number == EINTR;
    int same = what->st_dev == broken_device && what->st_ino == broken_inode;
    int lasts = mode == FAIL_READ_FROM && fired && (shortage || same) && (error_number != EINTR || fired < 50);
    if (mode > COUNT_READ && (seen == chosen || lasts)) {
        if (!fired++) {
            note(name, 0, 0, 0, path, "fired");
            broken_device = what->st_dev, broken_inode = what->st_ino;
        }
        fails = 1;
    }
    pthread_mutex_unlock(&turn);
    if (fails)
        errno = error_number;
    return fails;
}

static int refused_path(const char *name, int dirfd, const char *path)
{
    struct stat what;
    char full[4096];
    if (mode < COUNT_READ || fstatat(dirfd, path, &what, 0))
        return 0;
    absolute(dirfd, path, full);
    return refused(name, full, &what);
}

static int refused_fd(int fd)
{
    struct stat what;
    char path[4096];
    if (mode < COUNT_READ || !path_of(fd, path) || fstat(fd, &what) || !S_ISREG(what.st_mode))
        return 0;
    return refused("read", path, &what);
}

/* -------------------------------------------------------------------------------------- the calls */

#define NAMES(name, path, other, call)                                                             \
    do {                                                                                           \
        if (mode == RECORD) {                                                                      \
            take_turn();                                                                           \
            __typeof__(call) result_ = call;                                                       \
            int saved_ = errno;                                                                    \
            if (result_ == 0)                                                                      \
                seen++, note(name, 0, 0, 0, path, other);                                          \
            give_turn();                                                                           \
            errno = saved_;                                                                        \
            return result_;                                                                        \
        }                                                                                          \
        if (enter(name, path, 0) == STOP)                                                          \
            return -1;                                                                             \
    } while (0)

static unsigned long inode_of(int fd)
{
    struct stat found;
    return fstat(fd, &found) == 0 ? (unsigned long)found.st_ino : 0;
}

static int open_any(int dirfd, const char *path, int flags, mode_t permissions)
{
    static int (*openat_)(int, const char *, int, ...);
    if (!openat_)
        openat_ = REAL(openat);
    if (!(flags & (O_ACCMODE | O_CREAT | O_TRUNC | O_DIRECTORY)) && refused_path("open", dirfd, path))
        return -1;
    if (mode == OFF || !(flags & (O_CREAT | O_TRUNC)) || (flags & O_TMPFILE) == O_TMPFILE)
        return openat_(dirfd, path, flags, permissions);
    char full[4096];
    absolute(dirfd, path, full);
    if (!below(full))
        return openat_(dirfd, path, flags, permissions);
    if (mode == RECORD) {
        take_turn();
        int fd = openat_(dirfd, path, flags, permissions);
        int saved = errno;
        if (fd >= 0)
            seen++, note(flags & O_TRUNC ? "truncating" : "open", inode_of(fd), 0, 0, full, "");
        give_turn();
        errno = saved;
        return fd;
    }
    if (enter("open", full, 0) == STOP)
        return -1;
    return openat_(dirfd, path, flags, permissions);
}

#define PERMISSIONS                                                                                \
    mode_t permissions = 0;                                                                        \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                           \
        va_list more;                                                                              \
        va_start(more, flags);                                                                     \
        permissions = va_arg(more, mode_t);                                                        \
        va_end(more);                                                                              \
    }

int open(const char *path, int flags, ...) { PERMISSIONS return open_any(AT_FDCWD, path, flags, permissions); }
int open64(const char *path, int flags, ...) { PERMISSIONS return open_any(AT_FDCWD, path, flags, permissions); }
int openat(int dirfd, const char *path, int flags, ...) { PERMISSIONS return open_any(dirfd, path, flags, permissions); }
int openat64(int dirfd, const char *path, int flags, ...) { PERMISSIONS return open_any(dirfd, path, flags, permissions); }
int creat(const char *path, mode_t permissions) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, permissions); }
int creat64(const char *path, mode_t permissions) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, permissions); }

/* libstdc++ opens its streams with fopen, which calls open inside libc, where nobody can stand. */
static FILE *fopen_any(const char *path, const char *how, const char *name)
{
    FILE *(*fopen_)(const char *, const char *) = (FILE * (*)(const char *, const char *)) real(name);
    if (mode == OFF || !strpbrk(how, "wa+"))
        return fopen_(path, how);
    char full[4096];
    absolute(AT_FDCWD, path, full);
    if (!below(full))
        return fopen_(path, how);
    if (mode == RECORD) {
        take_turn();
        FILE *file = fopen_(path, how);
        if (file)
            seen++, note(strchr(how, 'w') ? "truncating" : "open", inode_of(fileno(file)), 0, 0, full, "");
        give_turn();
        return file;
    }
    if (enter("open", full, 0) == STOP)
        return NULL;
    return fopen_(path, how);
}

FILE *fopen(const char *path, const char *how) { return fopen_any(path, how, "fopen"); }
FILE *fopen64(const char *path, const char *how) { return fopen_any(path, how, "fopen64"); }

/* All writes end here. `offset` is -1 for "where the file stands". */
static ssize_t put_bytes(int fd, const struct iovec *parts, int count, off_t offset, const char *path)
{
    size_t length = 0;
    for (int i = 0; i < count; i++)
        length += parts[i].iov_len;
    int verdict = mode == RECORD ? GO : enter("write", path, 1);
    if (verdict == STOP)
        return -1;
    if (verdict == KEEP_NOTHING) { /* what the file did not have before reads as zeros */
        if (offset < 0)
            lseek(fd, length, SEEK_CUR);
        return length;
    }
    char *joined = malloc(length ? length : 1);
    size_t at = 0;
    for (int i = 0; i < count; i++) {
        memcpy(joined + at, parts[i].iov_base, parts[i].iov_len);
        at += parts[i].iov_len;
    }
    if (verdict == HALF)
        length = length / 2;
    if (verdict == FLIP && length)
        joined[length / 2] ^= 1;
    if (mode == RECORD)
        take_turn();
    ssize_t result;
    const char *source = count == 1 && verdict != FLIP ? parts[0].iov_base : joined; /* direct I/O: alignment */
    void *aligned = NULL;
    if (source == joined && posix_memalign(&aligned, 4096, length ? length : 1) == 0)
        memcpy(aligned, joined, length), source = aligned;
    if (verdict == HALF && length > 4096)
        length -= length % 4096;
    result = offset < 0 ? syscall(SYS_write, fd, source, length)
                        : syscall(SYS_pwrite64, fd, source, length, offset);
    int saved = errno;
    if (mode == RECORD) {
        if (result >= 0) {
            off_t begin = offset >= 0 ? offset : lseek(fd, 0, SEEK_CUR) - result;
            if (by_environment && (room -= result) < 0) { /* the rest cannot be told */
                note("full", 0, 0, 0, path, "");
                mode = OFF;
            } else {
                seen++, note("write", inode_of(fd), begin, result, path, ""), put(joined, result);
            }
        }
        give_turn();
    }
    free(joined);
    free(aligned);
    if (verdict == HALF && mode == KILL_HALF)
        die();
    errno = saved;
    return result;
}

static int watched(int fd, char *path) { return mode != OFF && path_of(fd, path) && below(path); }

/* What a script says goes between its calls, so that a step can be found among them. */
static void overhear(int fd, const void *data, size_t length)
{
    if (mode != RECORD || !by_environment || (fd != 1 && fd != 2))
        return;
    take_turn();
    note("out", 0, fd, length, "", ""), put(data, length);
    give_turn();
}

ssize_t write(int fd, const void *data, size_t length)
{
    char path[4096];
    struct iovec part = {(void *)data, length};
    overhear(fd, data, length);
    if (!watched(fd, path))
        return syscall(SYS_write, fd, data, length);
    return put_bytes(fd, &part, 1, -1, path);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    char path[4096];
    if (!watched(fd, path))
        return syscall(SYS_writev, fd, parts, count);
    return put_bytes(fd, parts, count, -1, path);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset)
{
    char path[4096];
    struct iovec part = {(void *)data, length};
    if (!watched(fd, path))
        return syscall(SYS_pwrite64, fd, data, length, offset);
    return put_bytes(fd, &part, 1, offset, path);
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return pwrite64(fd, data, length, offset); }

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset)
{
    char path[4096];
    if (!watched(fd, path))
        return REAL(pwritev64)(fd, parts, count, offset);
    return put_bytes(fd, parts, count, offset, path);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) { return pwritev64(fd, parts, count, offset); }

/* What reads. */
ssize_t read(int fd, void *data, size_t length)
{
    return refused_fd(fd) ? -1 : syscall(SYS_read, fd, data, length);
}

ssize_t pread64(int fd, void *data, size_t length, off64_t offset)
{
    return refused_fd(fd) ? -1 : syscall(SYS_pread64, fd, data, length, offset);
}

ssize_t pread(int fd, void *data, size_t length, off_t offset) { return pread64(fd, data, length, offset); }

ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t offset)
{
    return refused_fd(fd) ? -1 : REAL(preadv64)(fd, parts, count, offset);
}

ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset) { return preadv64(fd, parts, count, offset); }

ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags)
{
    return refused_fd(fd) ? -1 : REAL(preadv64v2)(fd, parts, count, offset, flags);
}

ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags) { return preadv64v2(fd, parts, count, offset, flags); }

DIR *opendir(const char *path) { return refused_path("list", AT_FDCWD, path) ? NULL : REAL(opendir)(path); }

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t length, unsigned flags)
{
    char path[4096];
    if (watched(out, path)) { /* RECORD cannot tell its bytes: the caller falls back to writes */
        if (mode == RECORD) {
            errno = ENOSYS;
            return -1;
        }
        int verdict = enter("copy_file_range", path, 1);
        if (verdict == STOP)
            return -1;
        if (verdict == HALF)
            length /= 2;
    }
    ssize_t result = syscall(SYS_copy_file_range, in, from, out, to, length, flags);
    if (mode == KILL_HALF && fired)
        die();
    return result;
}

/* As above: who copies falls back to writes. */
ssize_t sendfile64(int out, int in, off64_t *from, size_t length)
{
    char path[4096];
    if (watched(out, path)) {
        if (mode == RECORD) {
            errno = ENOSYS;
            return -1;
        }
        int verdict = enter("sendfile", path, 1);
        if (verdict == STOP)
            return -1;
        if (verdict == HALF)
            length /= 2;
    }
    ssize_t result = syscall(SYS_sendfile, out, in, from, length);
    if (mode == KILL_HALF && fired)
        die();
    return result;
}

ssize_t sendfile(int out, int in, off_t *from, size_t length) { return sendfile64(out, in, from, length); }

int ioctl(int fd, unsigned long request, ...)
{
    va_list more;
    va_start(more, request);
    void *argument = va_arg(more, void *);
    va_end(more);
    char path[4096];
    if (request == 0x40049409 /* FICLONE */ && watched(fd, path)) {
        if (mode == RECORD) {
            errno = EOPNOTSUPP;
            return -1;
        }
        if (enter("ficlone", path, 0) == STOP)
            return -1;
    }
    return syscall(SYS_ioctl, fd, request, argument);
}

/* Calls on a descriptor that change no bytes of a file, or cut them. */
#define ON_FD(name, offset, call)                                                                  \
    do {                                                                                           \
        char path[4096];                                                                           \
        if (watched(fd, path)) {                                                                   \
            if (mode == RECORD) {                                                                  \
                take_turn();                                                                       \
                int result_ = call, saved_ = errno;                                                \
                if (result_ == 0)                                                                  \
                    seen++, note(name, inode_of(fd), offset, 0, path, "");                         \
                give_turn();                                                                       \
                errno = saved_;                                                                    \
                return result_;                                                                    \
            }                                                                                      \
            if (enter(name, path, 0) == STOP)                                                      \
                return -1;                                                                         \
        }                                                                                          \
    } while (0)

int fsync(int fd) { ON_FD("fsync", 0, syscall(SYS_fsync, fd)); return syscall(SYS_fsync, fd); }
int fdatasync(int fd) { ON_FD("fsync", 0, syscall(SYS_fdatasync, fd)); return syscall(SYS_fdatasync, fd); }
int ftruncate(int fd, off_t size) { ON_FD("ftruncate", size, syscall(SYS_ftruncate, fd, size)); return syscall(SYS_ftruncate, fd, size); }
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }
int fchmod(int fd, mode_t bits) { ON_FD("fchmod", bits, syscall(SYS_fchmod, fd, bits)); return syscall(SYS_fchmod, fd, bits); }

int posix_fallocate(int fd, off_t from, off_t length)
{
    char path[4096];
    if (watched(fd, path)) {
        if (mode == RECORD) {
            take_turn();
            int result = syscall(SYS_fallocate, fd, 0, from, length) ? errno : 0;
            if (result == 0)
                seen++, note("fallocate", inode_of(fd), from + length, 0, path, "");
            give_turn();
            return result;
        }
        if (enter("fallocate", path, 0) == STOP)
            return errno;
    }
    return syscall(SYS_fallocate, fd, 0, from, length) ? errno : 0;
}

int posix_fallocate64(int fd, off64_t from, off64_t length) { return posix_fallocate(fd, from, length); }

/* The descriptor is gone even when close reports an error (a quota that shows late). */
int close(int fd)
{
    char path[4096];
    if (mode == OFF || mode == RECORD || !watched(fd, path) || !(fcntl(fd, F_GETFL) & (O_WRONLY | O_RDWR)))
        return syscall(SYS_close, fd);
    int verdict = enter("close", path, 0);
    int saved = errno;
    int result = syscall(SYS_close, fd);
    if (verdict == STOP) {
        errno = saved;
        return -1;
    }
    return result;
}

static int two_names(const char *name, const char *from, const char *to, int (*call)(void *), void *with)
{
    if (mode == OFF || !below(to))
        return call(with);
    NAMES(name, from, to, call(with));
    return call(with);
}

struct pair { int dir, to_dir, flags; const char *path, *to; };
static int do_rename(void *v) { struct pair *p = v; return syscall(SYS_renameat2, p->dir, p->path, p->to_dir, p->to, p->flags); }
static int do_link(void *v) { struct pair *p = v; return syscall(SYS_linkat, p->dir, p->path, p->to_dir, p->to, p->flags); }

static int rename_any(int dir, const char *path, int to_dir, const char *to, int flags)
{
    struct pair both = {dir, to_dir, flags, path, to};
    char from_full[4096], to_full[4096];
    absolute(dir, path, from_full), absolute(to_dir, to, to_full);
    return two_names("rename", from_full, to_full, do_rename, &both);
}

int rename(const char *path, const char *to) { return rename_any(AT_FDCWD, path, AT_FDCWD, to, 0); }
int renameat(int dir, const char *path, int to_dir, const char *to) { return rename_any(dir, path, to_dir, to, 0); }
int renameat2(int dir, const char *path, int to_dir, const char *to, unsigned flags) { return rename_any(dir, path, to_dir, to, flags); }

int linkat(int dir, const char *path, int to_dir, const char *to, int flags)
{
    struct pair both = {dir, to_dir, flags, path, to};
    char from_full[4096], to_full[4096];
    absolute(dir, path, from_full), absolute(to_dir, to, to_full);
    return two_names("link", from_full, to_full, do_link, &both);
}

int link(const char *path, const char *to) { return linkat(AT_FDCWD, path, AT_FDCWD, to, 0); }

static int do_unlink(void *v) { struct pair *p = v; return syscall(SYS_unlinkat, p->dir, p->path, p->flags); }
static int do_mkdir(void *v) { struct pair *p = v; return syscall(SYS_mkdirat, p->dir, p->path, p->flags); }
static int do_chmod(void *v) { struct pair *p = v; return syscall(SYS_fchmodat, p->dir, p->path, p->flags); }

static int one_name(const char *name, int dir, const char *path, int flags, int (*call)(void *))
{
    struct pair one = {dir, dir, flags, path, path};
    char full[4096];
    absolute(dir, path, full);
    return two_names(name, full, full, call, &one);
}

int unlink(const char *path) { return one_name("unlink", AT_FDCWD, path, 0, do_unlink); }
int unlinkat(int dir, const char *path, int flags) { return one_name(flags & AT_REMOVEDIR ? "rmdir" : "unlink", dir, path, flags, do_unlink); }
int rmdir(const char *path) { return one_name("rmdir", AT_FDCWD, path, AT_REMOVEDIR, do_unlink); }
int mkdir(const char *path, mode_t bits) { return one_name("mkdir", AT_FDCWD, path, bits, do_mkdir); }
int mkdirat(int dir, const char *path, mode_t bits) { return one_name("mkdir", dir, path, bits, do_mkdir); }
int chmod(const char *path, mode_t bits) { return one_name("chmod", AT_FDCWD, path, bits, do_chmod); }
