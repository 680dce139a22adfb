//! A chain of 30 Rust functions that spins for SECONDS. Usage: shapes-rs SECONDS
use std::{
    hint::black_box,
    time::{Duration, Instant},
};

trait Step {
    fn go(&self, depth: u32, deadline: Instant) -> u64;
}

struct Odd;
struct Even;

impl Step for Odd {
    #[inline(never)]
    fn go(&self, depth: u32, deadline: Instant) -> u64 {
        descend(&Even, depth, deadline) + 1
    }
}

impl Step for Even {
    #[inline(never)]
    fn go(&self, depth: u32, deadline: Instant) -> u64 {
        descend(&Odd, depth, deadline) + 2
    }
}

#[inline(never)]
fn descend(next: &dyn Step, depth: u32, deadline: Instant) -> u64 {
    if depth == 0 {
        return black_box(spin(deadline));
    }
    black_box(next).go(depth - 1, deadline) ^ 1
}

#[inline(never)]
fn spin(deadline: Instant) -> u64 {
    let mut sum = 0u64;
    while Instant::now() < deadline {
        for number in 0..100_000u64 {
            sum = black_box(sum.wrapping_add(number));
        }
    }
    sum
}

fn main() {
    let seconds: f64 = std::env::args().nth(1).and_then(|text| text.parse().ok()).expect("SECONDS");
    let deadline = Instant::now() + Duration::from_secs_f64(seconds);
    let thread = std::thread::spawn(move || descend(&Odd, 14, deadline));
    black_box(descend(&Odd, 14, deadline));
    thread.join().expect("a thread that does not panic");
}
