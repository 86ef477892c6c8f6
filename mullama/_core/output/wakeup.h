// A wake-up that a select()-style loop can wait for: eventfd on Linux, a pipe elsewhere.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#include <fcntl.h>
#include <io.h>
#else
#include <fcntl.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/eventfd.h>
#endif

namespace mullama {

struct Wake {
    int read_fd = -1;
    int write_fd = -1;

    bool open() {
#if defined(__linux__)
        read_fd = write_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        return read_fd >= 0;
#elif defined(_WIN32)
        int fds[2];
        if (_pipe(fds, 256, _O_BINARY) != 0) return false;
        read_fd = fds[0];
        write_fd = fds[1];
        return true;
#else
        int fds[2];
        if (pipe(fds) != 0) return false;
        for (int fd : fds) {
            fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
            fcntl(fd, F_SETFD, FD_CLOEXEC);
        }
        read_fd = fds[0];
        write_fd = fds[1];
        return true;
#endif
    }

    void close() {
#if defined(_WIN32)
        if (read_fd >= 0) _close(read_fd);
        if (write_fd >= 0) _close(write_fd);
#else
        if (read_fd >= 0) ::close(read_fd);
        if (write_fd >= 0 && write_fd != read_fd) ::close(write_fd);
#endif
        read_fd = write_fd = -1;
    }

    // A full pipe already wakes the reader, so a failed write is no loss.
    void signal() const {
        const uint64_t one = 1;
#if defined(_WIN32)
        (void) !_write(write_fd, &one, 1);
#elif defined(__linux__)
        (void) !::write(write_fd, &one, sizeof one);
#else
        (void) !::write(write_fd, &one, 1);
#endif
    }

    void clear() const {
        uint64_t buf[8];
#if defined(_WIN32)
        (void) !_read(read_fd, buf, sizeof buf);
#else
        while (::read(read_fd, buf, sizeof buf) == (long) sizeof buf) {
#if defined(__linux__)
            break; // one read empties an eventfd
#endif
        }
#endif
    }
};

} // namespace mullama
