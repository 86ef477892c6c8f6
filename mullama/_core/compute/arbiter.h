// Whose turn it is to compute. Two graphs at once on the same cores slow each other a hundredfold (docs/llama.md), so
// every step of every engine of this process holds the one turn there is.
#pragma once

#include "clock.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace mullama {

enum TurnPolicy : int {
    TURN_ROUND_ROBIN = 0, // who waits longest
    TURN_WEIGHTED    = 1, // who has had the least compute time for its weight
    TURN_PRIORITY    = 2, // the highest priority, then who waits longest
};

struct TurnSeat {
    double   weight   = 1.0;
    int      priority = 0;
    double   spent    = 0.0; // ns of compute, divided by the weight; brought up to the others' after idling
    uint64_t used_ns  = 0;
    uint64_t wait_ns  = 0;
    uint64_t turns    = 0;
    uint64_t ticket   = 0;   // order of arrival while waiting; 0: not waiting
    uint64_t last_ns  = 0;   // its last turn began or ended
    std::condition_variable granted;
};

// A seat as it is shown.
struct SeatUse {
    int      id, priority;
    double   weight;
    uint64_t used_ns, wait_ns, turns;
    bool     is_waiting;
};

class TurnTable {
  public:
    // Seats get numbers above ``taken``.
    explicit TurnTable(int taken = 0) : last_id(taken) {}

    int taken() const { return last_id; }

    int join() {
        std::lock_guard<std::mutex> hold(lock);
        seats[++last_id] = std::make_unique<TurnSeat>();
        return last_id;
    }

    void leave(int id) {
        std::lock_guard<std::mutex> hold(lock);
        if (holder == id) pass_on();
        seats.erase(id);
    }

    // Wait for the turn. False: told to stop meanwhile, and the turn is not held.
    bool acquire(int id, const Flag & stop) {
        std::unique_lock<std::mutex> hold(lock);
        TurnSeat & seat = *seats.at(id);
        if (seat.spent < floor) seat.spent = floor;
        if (holder == 0 && n_waiting == 0) {
            holder = id;
            seat.turns++;
            seat.last_ns = now_ns();
            return true;
        }
        const uint64_t start = now_ns();
        seat.ticket = ++tickets;
        n_waiting++;
        if (holder == 0) pass_on();
        while (holder != id) {
            // An abort does not know of this lock, so it is looked for.
            seat.granted.wait_for(hold, std::chrono::milliseconds(20));
            if (holder != id && stop.get()) {
                seat.ticket = 0;
                n_waiting--;
                return false;
            }
        }
        seat.last_ns = now_ns();
        seat.wait_ns += seat.last_ns - start;
        seat.turns++;
        return true;
    }

    void release(int id, uint64_t used_ns) {
        std::lock_guard<std::mutex> hold(lock);
        TurnSeat & seat = *seats.at(id);
        seat.used_ns += used_ns;
        seat.last_ns = now_ns();
        seat.spent += (double) used_ns / seat.weight;
        if (holder == id) pass_on();
    }

    // Whether another engine has computed within the last ``ns``.
    bool busy_beside(int id, uint64_t ns) {
        std::lock_guard<std::mutex> hold(lock);
        const uint64_t now = now_ns();
        for (auto & entry : seats) {
            if (entry.first != id && (entry.first == holder || now - entry.second->last_ns < ns)) return true;
        }
        return false;
    }

    // What a seat may expect. False: nobody has it.
    bool share(int id, double weight, int priority) {
        std::lock_guard<std::mutex> hold(lock);
        auto found = seats.find(id);
        if (found == seats.end()) return false;
        found->second->weight   = weight;
        found->second->priority = priority;
        return true;
    }

    std::vector<SeatUse> uses() {
        std::lock_guard<std::mutex> hold(lock);
        std::vector<SeatUse> found;
        for (auto & entry : seats) {
            const TurnSeat & seat = *entry.second;
            found.push_back({ entry.first, seat.priority, seat.weight, seat.used_ns, seat.wait_ns, seat.turns, seat.ticket != 0 });
        }
        return found;
    }

    std::atomic<int> policy{TURN_ROUND_ROBIN};

  private:
    // The turn goes to the next one who waits; the lock is held.
    void pass_on() {
        holder = 0;
        int next = 0;
        TurnSeat * best = nullptr;
        for (auto & entry : seats) {
            TurnSeat & seat = *entry.second;
            if (seat.ticket == 0) continue;
            if (best == nullptr || before(seat, *best)) {
                best = &seat;
                next = entry.first;
            }
        }
        if (best == nullptr) return;
        // Who comes back after idling has no claim on what the others used meanwhile.
        if (best->spent > floor) floor = best->spent;
        best->ticket = 0;
        n_waiting--;
        holder = next;
        best->granted.notify_one();
    }

    bool before(const TurnSeat & a, const TurnSeat & b) const {
        if (policy == TURN_WEIGHTED && a.spent != b.spent) return a.spent < b.spent;
        if (policy == TURN_PRIORITY && a.priority != b.priority) return a.priority > b.priority;
        return a.ticket < b.ticket;
    }

    std::mutex lock;
    std::map<int, std::unique_ptr<TurnSeat>> seats;
    int holder = 0; // 0: nobody
    int last_id;
    int n_waiting = 0;
    uint64_t tickets = 0;
    double floor = 0.0;
};

} // namespace mullama
