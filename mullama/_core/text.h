// From token pieces to text that may be shown: whole UTF-8 characters, and never a part of a stop string.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mullama {

// Bytes at the end of `s` that begin a UTF-8 character whose rest has not come yet (0 to 3).
inline size_t utf8_incomplete_tail(std::string_view s) {
    const size_t n = s.size();
    for (size_t back = 1; back <= 3 && back <= n; ++back) {
        const unsigned char c = (unsigned char) s[n - back];
        if ((c & 0xC0) == 0x80) continue; // continuation: look further back for the lead byte
        size_t length = 1;
        if ((c & 0xE0) == 0xC0) length = 2;
        else if ((c & 0xF0) == 0xE0) length = 3;
        else if ((c & 0xF8) == 0xF0) length = 4;
        return length > back ? back : 0;
    }
    return 0;
}

class TextGate {
  public:
    std::vector<std::string> stops;

    // Append a piece. `released` gets the bytes that became final. Returns the index of the stop string that was
    // completed (text from its first byte on is discarded), or -1. Of several, the one that starts first wins.
    int push(const char * piece, size_t n, bool check_stops, std::string & released) {
        held.append(piece, n);
        released.clear();
        size_t keep = 0;
        if (!stops.empty() && check_stops) {
            size_t first = std::string::npos;
            int which = -1;
            for (size_t i = 0; i < stops.size(); ++i) {
                const size_t at = held.find(stops[i]);
                if (at < first) { // npos is never smaller
                    first = at;
                    which = (int) i;
                }
            }
            if (which >= 0) {
                released.assign(held, 0, first);
                held.clear();
                return which;
            }
            for (const auto & stop : stops) {
                keep = longer(keep, overlap(stop));
            }
        }
        keep = longer(keep, utf8_incomplete_tail(std::string_view(held).substr(0, held.size() - keep)) + keep);
        released.assign(held, 0, held.size() - keep);
        held.erase(0, held.size() - keep);
        return -1;
    }

    // End of text: what was held back is final after all.
    void flush(std::string & released) {
        released.swap(held);
        held.clear();
    }

  private:
    std::string held;

    static size_t longer(size_t a, size_t b) { return a > b ? a : b; }

    // Longest end of `held` that is a beginning of `stop`, and not all of it.
    size_t overlap(const std::string & stop) const {
        const size_t longest = stop.size() - 1 < held.size() ? stop.size() - 1 : held.size();
        for (size_t n = longest; n > 0; --n) {
            if (held.compare(held.size() - n, n, stop, 0, n) == 0) {
                return n;
            }
        }
        return 0;
    }
};

} // namespace mullama
