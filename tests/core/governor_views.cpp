// A Governor that one thread works with while others look at it: every view is of one moment.
//
// Two decodes that were given up leave for one thread, and work after idling takes two again: so two threads are settled
// on after an even number of changes, and one after an odd number. The costs of one decode are written together with a
// trial's end. 0 when all views are right, 1 and a line when one is of two moments.
#include "governor.h"

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

using namespace mullama;

int main() {
    constexpr uint64_t VIEWS = 100000, MS = 1000000;
    Governor governor(2, false, 2);
    std::atomic<bool> stop{false};
    std::atomic<int> torn{0};
    std::atomic<uint64_t> changes{0};
    std::thread engine([&] {
        uint64_t now = 1000 * MS;
        while (!stop) {
            now += MS;
            governor.record(1, 2, MS, true, now);
            governor.record(1, 2, MS, true, now); // twice: down to 1
            governor.wake(0.0, now);              // up to 2
            changes = governor.n_changes();
        }
    });
    std::vector<std::thread> readers;
    for (int i = 0; i < 2; ++i) {
        readers.emplace_back([&] {
            // At least so many, and until the other side has moved beside them.
            for (uint64_t n = 0; n < VIEWS || changes < 200000; ++n) {
                const Governor::View view = governor.view();
                if ((view.threads == 2) != (view.changes % 2 == 0)) torn++;
            }
        });
    }
    for (auto & reader : readers) reader.join();
    stop = true;
    engine.join();
    if (torn != 0) std::printf("%d views are of two moments\n", torn.load());
    return torn != 0;
}
