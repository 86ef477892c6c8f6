// The matcher of pre-tokenizers beside std::regex, on random texts: harness N FILE..., a file an expression.
// It begins with c for bytes, or w for UTF-32. The status is 1 where matches differ.
#include "unicode-regex.h"
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <regex>

template <typename Char>
static std::vector<std::pair<size_t, size_t>> expected(const std::basic_string<Char> & text, const std::basic_regex<Char> & regex) {
    std::vector<std::pair<size_t, size_t>> found;
    using It = typename std::basic_string<Char>::const_iterator;
    for (std::regex_iterator<It> it(text.begin(), text.end(), regex), end; it != end; ++it) {
        found.emplace_back(it->position(), it->length());
    }
    return found;
}

static uint32_t code(char c) { return (unsigned char) c; }
static uint32_t code(wchar_t c) { return (uint32_t) c; }

template <typename Char>
static long compare(const std::basic_string<Char> & expression, const std::basic_string<Char> & alphabet, long n, unsigned seed) {
    const std::basic_regex<Char> regex(expression, std::regex_constants::optimize | std::regex_constants::nosubs);
    std::vector<uint32_t> codes;
    for (const Char c : expression) { codes.push_back(code(c)); }
    const unicode_regex::program program(codes);
    std::mt19937 random(seed);
    long bad = 0;
    for (long i = 0; i < n; ++i) {
        std::basic_string<Char> text;
        const size_t size = random() % (i % 10 ? 24 : 300);
        while (text.size() < size) {
            const Char c = alphabet[random() % alphabet.size()];
            text.append(random() % 3 ? 1 : 1 + random() % 8, c);
        }
        std::vector<uint32_t> in;
        for (const Char c : text) { in.push_back(code(c)); }
        bad += program.matches(in.data(), in.size()) != expected(text, regex);
    }
    return bad;
}

int main(int argc, char ** argv) {
    const long n = atol(argv[1]);
    for (int i = 2; i < argc; ++i) {
        std::ifstream file(argv[i], std::ios::binary);
        const std::string all((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
        long bad;
        if (all[0] == 'w') {  // UTF-32
            std::wstring wide;
            for (size_t at = 1; at < all.size(); at += 4) {
                wide += (wchar_t) (code(all[at]) | code(all[at + 1]) << 8 | code(all[at + 2]) << 16 | code(all[at + 3]) << 24);
            }
            bad = compare<wchar_t>(wide, L"aZs'tLl09 \t\n\r.,!?-_/\x0b\x00e9\x00c4\x0416\x4e2d\x3042\xac00\xff21\x2014\x3002\x10400", n, i);
        } else {
            std::string alphabet = "aZs'tTrReEvVmMLldD0123 \t\n\r.,!?-_/()$+<=>^~|[]{}`@#%&*;:\"\\IMGABZ\x0b\x1c";
            alphabet += "\xd0\xd1\xd2\xd2\xd3\xd4\xd5";
            bad = compare<char>(all.substr(1), alphabet, n, i);
        }
        if (bad) {
            printf("%s: %ld of %ld texts differ\n", argv[i], bad, n);
            return 1;
        }
    }
    return 0;
}
