//! Random operations, unaligned to everything, several at a time, against a model of plain bytes.

use crate::beds::on_every_store_with;
use crate::suite::{askew, pattern, range, read, scattered};
use layout::HostOffset;
use proptest::prelude::*;
use std::rc::Rc;
use store::{Store, ZeroMode};

/// One step: operations on ranges that do not overlap, started together.
type Step = Vec<Operation>;

#[derive(Clone, Debug)]
enum Operation {
    Read { at: usize, len: usize },
    Write { at: usize, len: usize, tag: u8, fua: bool },
    Zero { at: usize, len: usize, unmap: bool },
    Allocate { at: usize, len: usize },
    Flush,
    Extent { at: usize, len: usize },
    SetSize(usize),
}

const SPAN: usize = 40_000;

fn position() -> impl Strategy<Value = usize> + Clone {
    prop_oneof![0..SPAN, (0..SPAN / 512).prop_map(|block| block * 512), (0..SPAN / 4096).prop_map(|page| page * 4096)]
}

fn operation() -> impl Strategy<Value = Operation> {
    let run = (position(), position()).prop_map(|(a, b)| (a.min(b), a.abs_diff(b)));
    prop_oneof![
        3 => run.clone().prop_map(|(at, len)| Operation::Read { at, len }),
        6 => (run.clone(), any::<u8>(), any::<bool>())
            .prop_map(|((at, len), tag, fua)| Operation::Write { at, len, tag, fua }),
        2 => (run.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Operation::Zero { at, len, unmap }),
        1 => run.clone().prop_map(|(at, len)| Operation::Allocate { at, len }),
        1 => Just(Operation::Flush),
        1 => run.prop_map(|(at, len)| Operation::Extent { at, len }),
        1 => position().prop_map(Operation::SetSize),
    ]
}

impl Operation {
    fn span(&self) -> Option<(usize, usize)> {
        match *self {
            Self::Read { at, len }
            | Self::Write { at, len, .. }
            | Self::Zero { at, len, .. }
            | Self::Allocate { at, len }
            | Self::Extent { at, len } => Some((at, at + len)),
            Self::Flush => Some((0, 0)),
            Self::SetSize(_) => None,
        }
    }

    fn apply(&self, model: &mut Vec<u8>) {
        let mut grow = |end: usize, len: usize| {
            if len > 0 && end > model.len() {
                model.resize(end, 0);
            }
        };
        match *self {
            Self::Write { at, len, tag, .. } => {
                grow(at + len, len);
                if len > 0 {
                    model[at..at + len].copy_from_slice(&pattern(tag, len));
                }
            }
            Self::Zero { at, len, .. } => {
                grow(at + len, len);
                if len > 0 {
                    model[at..at + len].fill(0);
                }
            }
            Self::Allocate { at, len } => grow(at + len, len),
            Self::SetSize(size) => model.resize(size, 0),
            _ => {}
        }
    }

    async fn run(self, store: Rc<dyn Store>, before: Rc<Vec<u8>>) {
        match self {
            Self::Read { at, len } => {
                let mut expected = before[at.min(before.len())..(at + len).min(before.len())].to_vec();
                expected.resize(len, 0);
                assert!(read(&store, at as u64, len).await == expected, "read {at}+{len}");
            }
            Self::Write { at, len, tag, fua } => {
                let bytes = pattern(tag, len);
                let from = if tag % 2 == 0 { askew(&bytes) } else { scattered(&bytes) };
                store.write(HostOffset(at as u64), from, fua).await.unwrap();
            }
            Self::Zero { at, len, unmap } => {
                store.zero(range(at as u64, len as u64), ZeroMode { unmap }).await.unwrap();
            }
            Self::Allocate { at, len } => store.allocate(range(at as u64, len as u64)).await.unwrap(),
            Self::Flush => store.flush().await.unwrap(),
            Self::Extent { at, len } => {
                if len > 0 {
                    let extent = store.extent(range(at as u64, len as u64)).await.unwrap();
                    assert!((1..=len as u64).contains(&extent.len));
                }
            }
            Self::SetSize(size) => store.set_size(size as u64).await.unwrap(),
        }
    }
}

/// Cuts a list of operations into steps whose operations do not get into each other's way.
fn steps(operations: Vec<Operation>) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for operation in operations {
        let fits = steps.last().is_some_and(|step: &Step| {
            let Some((start, end)) = operation.span() else { return false };
            step.len() < 8
                && step.iter().all(|other| {
                    other.span().is_some_and(|(other_start, other_end)| end <= other_start || other_end <= start)
                })
        });
        match steps.last_mut() {
            Some(step) if fits => step.push(operation),
            _ => steps.push(vec![operation]),
        }
    }
    steps
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn every_store_is_plain_bytes(operations in prop::collection::vec(operation(), 1..60)) {
        let steps = steps(operations);
        on_every_store_with(2, async |store| {
            let mut model = Rc::new(Vec::new());
            for step in &steps {
                let tasks: Vec<_> = step
                    .iter()
                    .map(|operation| {
                        ring::spawn(operation.clone().run(Rc::clone(&store), Rc::clone(&model)))
                    })
                    .collect();
                for task in tasks {
                    task.await;
                }
                let next = Rc::make_mut(&mut model);
                for operation in step {
 operation.apply(next);
}
                assert_eq!(store.size(), model.len() as u64, "after {step:?}");
                assert!(read(&store, 0, model.len() + 100).await[..model.len()] == model[..], "after {step:?}");
            }
        });
    }
}
