//! Replays the corpus, and feeds mutations of it: the same ones every time, so that a failure repeats.

use headwater_fuzz_targets::{TARGETS, mutate::mutated};
use std::path::Path;
use std::time::Instant;

/// Mutations of each target's corpus. What takes long gets fewer.
const ROUNDS: [(&str, u64); 11] = [
    ("image_kept", 200),
    ("nbd_client", 20_000),
    ("nbd_server", 20_000),
    ("qcow2_image", 2_000),
    ("qcow2_repair", 400),
    ("qed_header", 2_000),
    ("qed_image", 300),
    ("qmp_framer", 20_000),
    ("sources", 20_000),
    ("vhost_request", 10_000),
    ("vhost_session", 400),
];

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&folder).expect("every target has a corpus").flatten().collect();
    files.sort_by_key(|file| file.file_name());
    files.iter().map(|file| std::fs::read(file.path()).expect("a readable corpus")).collect()
}

#[test]
fn the_corpus_and_its_mutations_stand() {
    for (name, target) in TARGETS {
        let began = Instant::now();
        let corpus = corpus(name);
        assert!(corpus.len() >= 3, "{name} has hardly a corpus");
        for input in &corpus {
            target(input);
        }
        let rounds = ROUNDS.iter().find(|(of, _)| of == name).expect("every target has its rounds").1;
        for seed in 0..rounds {
            let input = mutated(&corpus, seed, 4096);
            let stands = std::panic::catch_unwind(|| target(&input));
            assert!(stands.is_ok(), "{name} does not stand mutation {seed}: {input:?}");
        }
        println!("{name}: {} of the corpus, {rounds} mutations, {:.1?}", corpus.len(), began.elapsed());
    }
}
