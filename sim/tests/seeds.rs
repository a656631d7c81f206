//! A short run, the same every time: what `cargo xtask sim` does at length.

extern crate headwater_sim as sim;

use sim::{Options, run};

/// Seeds in every test run. Enough to catch most planted bugs; the long runs are made by `cargo xtask sim`.
const SEEDS: u64 = 100;

#[test]
fn no_seed_shows_wrong_data() {
    // In several threads, as the tests' build is slow.
    let tallies: Vec<sim::Tally> = std::thread::scope(|scope| {
        let parts: Vec<_> = (0..2)
            .map(|part| {
                scope.spawn(move || {
                    let seeds = (part..SEEDS).step_by(2);
                    let runs = seeds.map(|seed| {
                        run(seed, Options::default()).unwrap_or_else(|what| {
                            panic!("seed {seed}: {what}\n  again: cargo xtask sim --seed {seed} -v")
                        })
                    });
                    runs.fold(sim::Tally::default(), sim::Tally::and)
                })
            })
            .collect();
        parts.into_iter().map(|part| part.join().expect("it says which seed")).collect()
    });
    let all = tallies.into_iter().fold(sim::Tally::default(), sim::Tally::and);
    // A simulation that does nothing finds nothing.
    assert!(all.requests > 5_000 && all.states > 1_000 && all.power_offs > 40 && all.streams > 40, "{all:?}");
}

/// What is printed on a failure can be played again, to the operation.
#[test]
fn one_seed_is_one_run() {
    for seed in 0..8 {
        let (first, second) = (run(seed, Options::default()), run(seed, Options::default()));
        assert_eq!(first, second, "seed {seed}");
        assert_ne!(first.unwrap().hash, 0);
    }
    let (a, b) = (run(1, Options::default()).unwrap(), run(2, Options::default()).unwrap());
    assert_ne!(a.hash, b.hash);
}
