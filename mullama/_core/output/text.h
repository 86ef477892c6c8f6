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

    // Before the first piece: how the prompt ends. A character that it has only begun is shown whole if the first piece
    // goes on with it, and not at all if it does not.
    void begin(std::string_view prompt_end) {
        begun = prompt_end.substr(prompt_end.size() - utf8_incomplete_tail(prompt_end));
    }

    // Append a piece. `released` gets the bytes that became final. Returns the index of the stop string that ended the
    // text (what follows its first byte is discarded), or -1. Of those that overlap, the one that starts first counts,
    // wherever the pieces begin: a complete one waits as long as an earlier one may still become complete.
    int push(const char * piece, size_t n, bool check_stops, std::string & released) {
        if (!begun.empty() && n > 0) {
            if (((unsigned char) piece[0] & 0xC0) == 0x80) {
                held = begun;
            }
            begun.clear();
        }
        held.append(piece, n);
        released.clear();
        size_t keep = 0;
        if (!stops.empty() && check_stops) {
            size_t at = std::string::npos;
            const int which = first_stop(at);
            for (const auto & stop : stops) {
                keep = longer(keep, overlap(stop));
            }
            if (which >= 0 && held.size() - keep >= at) {
                end(at, released);
                return which;
            }
        }
        keep = longer(keep, utf8_incomplete_tail(std::string_view(held).substr(0, held.size() - keep)) + keep);
        released.assign(held, 0, held.size() - keep);
        held.erase(0, held.size() - keep);
        return -1;
    }

    // End of text: what was held back is final after all, up to a stop string that waited for an earlier one.
    int flush(std::string & released) {
        size_t at = held.size();
        const int which = first_stop(at);
        end(at, released);
        return which;
    }

  private:
    std::string held;
    std::string begun; // of the prompt's last character, until the first piece

    static size_t longer(size_t a, size_t b) { return a > b ? a : b; }

    // The complete stop string that starts first, and where; -1, and `at` as it was, when there is none.
    int first_stop(size_t & at) const {
        int which = -1;
        for (size_t i = 0; i < stops.size(); ++i) {
            const size_t found = held.find(stops[i]);
            if (found != std::string::npos && (which < 0 || found < at)) {
                at = found;
                which = (int) i;
            }
        }
        return which;
    }

    void end(size_t at, std::string & released) {
        released.assign(held, 0, at);
        held.clear();
    }

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
