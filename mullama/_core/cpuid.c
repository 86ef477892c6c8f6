// What the processor says of itself. Compiled for the oldest processor of its kind, so that it can be asked before any
// other compiled code runs; under an emulator it answers for the processor that is emulated.
#include <stdint.h>

#if defined(_WIN32)
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>

// The instruction CPUID: eax, ebx, ecx, edx of a leaf. Returns 0 where the processor has no such leaf.
EXPORTED int mullama_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t out[4]) {
    if (__get_cpuid_max(leaf & 0x80000000u, 0) < leaf) return 0;
    __cpuid_count(leaf, subleaf, out[0], out[1], out[2], out[3]);
    return 1;
}

// The registers that the system saves for each thread (XCR0); 0 where it does not say.
EXPORTED uint64_t mullama_saved_state(void) {
    uint32_t r[4] = { 0 }, low, high;
    if (!mullama_cpuid(1, 0, r) || !(r[2] & (1u << 27))) return 0; // OSXSAVE
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t) high << 32 | low;
}
#else
EXPORTED int mullama_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t out[4]) {
    (void) leaf;
    (void) subleaf;
    (void) out;
    return 0;
}

EXPORTED uint64_t mullama_saved_state(void) { return 0; }
#endif
