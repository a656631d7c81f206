//! Requests as a guest may frame them, well and badly.

use super::*;
use crate::vhost_user::memory::Memory;
use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TABLE: u64 = 0;
const HEAD: u64 = 0x1000;
const DATA: u64 = 0x2000;
const STATUS: u64 = 0x4000;
const END: u64 = 0x8000;
const CAPACITY: u64 = 64 * SECTOR;

const IN: u32 = VIRTIO_BLK_T_IN;
const OUT: u32 = VIRTIO_BLK_T_OUT;
const DISCARD: u32 = VIRTIO_BLK_T_DISCARD;
const ZEROES: u32 = VIRTIO_BLK_T_WRITE_ZEROES;

fn terms() -> Terms {
    Terms { features: Features::offered(false), size: CAPACITY + 100, read_only: false }
}

fn map() -> Rc<GuestMap> {
    // Two regions that touch: ranges may cross from one into the other.
    GuestMap::anonymous(&[(0, 0x3000), (0x3000, 0x5000)])
}

fn header(memory: &Memory, kind: u32, sector: u64) {
    memory.write_obj(kind, GuestAddress(HEAD)).unwrap();
    memory.write_obj(sector, GuestAddress(HEAD + 8)).unwrap();
}

fn chain(memory: &Memory, parts: &[(u64, u32, u16)]) -> Chain {
    for (i, &(at, len, flags)) in parts.iter().enumerate() {
        let next = if i + 1 < parts.len() { NEXT } else { 0 };
        let place = GuestAddress(TABLE + 16 * i as u64);
        memory.write_obj(Descriptor::new(at, len, flags | next, i as u16 + 1), place).unwrap();
    }
    Chain::follow(memory, GuestAddress(TABLE), 64, 0, true).unwrap()
}

fn parse(kind: u32, sector: u64, parts: &[(u64, u32, u16)], terms: &Terms) -> Result<Request, NoStatusByte> {
    let map = map();
    header(map.memory(), kind, sector);
    Request::parse(&chain(map.memory(), parts), &map, terms)
}

fn work(kind: u32, sector: u64, parts: &[(u64, u32, u16)]) -> Work {
    parse(kind, sector, parts, &terms()).unwrap().work
}

fn refused(work: Work) -> Status {
    match work {
        Work::Refuse(status) => status,
        _ => panic!("accepted"),
    }
}

fn ranges(kind: u32, list: &[(u64, u32, u32)], terms: &Terms) -> Work {
    let map = map();
    header(map.memory(), kind, 0);
    for (i, &(sector, count, flags)) in list.iter().enumerate() {
        let at = DATA + 16 * i as u64;
        map.memory().write_obj(sector, GuestAddress(at)).unwrap();
        map.memory().write_obj(count, GuestAddress(at + 8)).unwrap();
        map.memory().write_obj(flags, GuestAddress(at + 12)).unwrap();
    }
    let parts = [(HEAD, 16, 0), (DATA, 16 * list.len() as u32, 0), (STATUS, 1, WRITE)];
    let parts = if list.is_empty() { vec![parts[0], parts[2]] } else { parts.to_vec() };
    Request::parse(&chain(map.memory(), &parts), &map, terms).unwrap().work
}

#[test]
fn a_read_goes_to_guest_memory_and_its_status_behind_it() {
    let map = map();
    header(map.memory(), IN, 3);
    // The header in two parts, the data across both regions, the status in the same descriptor as the last data.
    let parts = [(HEAD, 6, 0), (HEAD + 6, 10, 0), (0x2e00, 1024, WRITE), (0x5000, 513, WRITE)];
    let request = Request::parse(&chain(map.memory(), &parts), &map, &terms()).unwrap();
    let (work, answer) = request.split();
    let Work::Read(at, into) = work else { panic!("not a read") };
    assert_eq!((at, into.len()), (GuestOffset(3 * 512), 1536));
    into.write(0, &[7; 1536]);
    assert_eq!(answer.give(Status::Ok), 1537);
    let mut all = [0; 513];
    map.memory().read_slice(&mut all, GuestAddress(0x5000)).unwrap();
    assert_eq!((&all[..512], all[512]), (&[7; 512][..], 0));
    let mut cross = [0; 1026];
    map.memory().read_slice(&mut cross, GuestAddress(0x2dff)).unwrap();
    assert_eq!((cross[0], &cross[1..1025], cross[1025]), (0, &[7; 1024][..], 0));
}

#[test]
fn a_write_comes_from_behind_the_header() {
    let map = map();
    map.memory().write_slice(&[9; 512], GuestAddress(HEAD + 16)).unwrap();
    header(map.memory(), OUT, 63);
    let request = Request::parse(&chain(map.memory(), &[(HEAD, 528, 0), (STATUS, 1, WRITE)]), &map, &terms()).unwrap();
    let Work::Write(at, from) = request.work else { panic!("not a write") };
    assert_eq!((at, from.to_vec()), (GuestOffset(63 * 512), vec![9; 512]));
}

#[test]
fn what_is_not_whole_or_not_inside_is_refused() {
    let data = |len| [(HEAD, 16, 0), (DATA, len, WRITE), (STATUS, 1, WRITE)];
    assert!(matches!(work(IN, 63, &data(512)), Work::Read(..)));
    for (sector, len) in [(0, 511), (0, 513), (63, 1024), (64, 512), (u64::MAX, 512), (u64::MAX / 512, 512)] {
        assert_eq!(refused(work(IN, sector, &data(len))), Status::IoError, "{sector} {len}");
        let out = [(HEAD, 16, 0), (DATA, len, 0), (STATUS, 1, WRITE)];
        assert_eq!(refused(work(OUT, sector, &out)), Status::IoError, "{sector} {len}");
    }
    // Data that is no memory, a header that is none, a header that is short, a flaw in the chain.
    for parts in [
        &[(HEAD, 16, 0), (END - 256, 512, WRITE), (STATUS, 1, WRITE)][..],
        &[(END, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)],
        &[(END - 8, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)],
        &[(u64::MAX - 3, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)],
        &[(HEAD, 15, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)],
        &[(HEAD, 16, 0), (DATA, 0, WRITE), (DATA, 512, WRITE), (STATUS, 1, WRITE)],
        &[(DATA, 512, WRITE), (HEAD, 16, 0), (STATUS, 1, WRITE)],
        &[(STATUS, 1, WRITE)],
    ] {
        assert_eq!(refused(work(IN, 0, parts)), Status::IoError, "{parts:?}");
    }
}

#[test]
fn a_refusal_is_written_into_the_status_byte() {
    let map = map();
    header(map.memory(), 77, 0);
    let parts = [(HEAD, 16, 0), (STATUS, 1, WRITE)];
    let request = Request::parse(&chain(map.memory(), &parts), &map, &terms()).unwrap();
    let (work, answer) = request.split();
    let status = refused(work);
    assert_eq!(status, Status::Unsupported);
    assert_eq!(answer.give(status), 1);
    assert_eq!(map.memory().read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 2);
}

#[test]
fn without_a_place_for_a_status_there_is_no_request() {
    for parts in [&[(HEAD, 16, 0)][..], &[(HEAD, 16, 0), (END, 1, WRITE)], &[(HEAD, 16, 0), (END - 1, 2, WRITE)]] {
        assert!(matches!(parse(IN, 0, parts, &terms()), Err(NoStatusByte)), "{parts:?}");
    }
}

#[test]
fn a_serial_fills_what_room_there_is() {
    for (len, want) in [(20, 20), (5, 5), (64, 20)] {
        let Work::Identify(into) =
            work(VIRTIO_BLK_T_GET_ID, 0, &[(HEAD, 16, 0), (DATA, len, WRITE), (STATUS, 1, WRITE)])
        else {
            panic!("not a request for the serial")
        };
        assert_eq!(into.len(), want);
    }
}

#[test]
fn discards_and_zeroes_are_checked_range_by_range() {
    let terms = terms();
    let Work::Discard(list) = ranges(DISCARD, &[(0, 8, 0), (60, 4, 0)], &terms) else { panic!() };
    assert_eq!(list.as_slice(), [GuestRange::new(GuestOffset(0), 4096), GuestRange::new(GuestOffset(30720), 2048)]);
    let Work::WriteZeroes(list) = ranges(ZEROES, &[(1, 1, 1), (2, 1, 0)], &terms) else { panic!() };
    assert_eq!(list.iter().map(|(_, unmap)| *unmap).collect::<Vec<_>>(), [true, false]);
    // Discarding has no flags, zeroing has one.
    assert_eq!(refused(ranges(DISCARD, &[(0, 8, 1)], &terms)), Status::Unsupported);
    assert_eq!(refused(ranges(ZEROES, &[(0, 8, 2)], &terms)), Status::Unsupported);
    // Outside, none at all, too many, not whole.
    assert_eq!(refused(ranges(ZEROES, &[(63, 2, 0)], &terms)), Status::IoError);
    assert_eq!(refused(ranges(DISCARD, &[(0, 8, 0), (u64::MAX, 8, 0)], &terms)), Status::IoError);
    assert_eq!(refused(ranges(DISCARD, &[], &terms)), Status::IoError);
    assert_eq!(refused(ranges(DISCARD, &[(0, 1, 0); 33], &terms)), Status::IoError);
    assert!(matches!(ranges(DISCARD, &[(0, 1, 0); 32], &terms), Work::Discard(list) if list.len() == 32));
    let odd = [(HEAD, 16, 0), (DATA, 24, 0), (STATUS, 1, WRITE)];
    assert_eq!(refused(work(DISCARD, 0, &odd)), Status::IoError);
    // Longer than the device said it takes.
    let large = Terms { size: 1 << 42, ..terms };
    assert!(matches!(ranges(ZEROES, &[(0, MAX_RANGE_SECTORS, 0)], &large), Work::WriteZeroes(_)));
    assert_eq!(refused(ranges(ZEROES, &[(0, MAX_RANGE_SECTORS + 1, 0)], &large)), Status::IoError);
}

#[test]
fn what_was_not_negotiated_or_writes_to_a_read_only_disk_is_refused() {
    let plain = Terms { features: Features(0), ..terms() };
    assert_eq!(refused(ranges(DISCARD, &[(0, 8, 0)], &plain)), Status::Unsupported);
    assert_eq!(refused(ranges(ZEROES, &[(0, 8, 0)], &plain)), Status::Unsupported);
    let read_only = Terms { read_only: true, ..terms() };
    let out = [(HEAD, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)];
    assert_eq!(refused(parse(OUT, 0, &out, &read_only).unwrap().work), Status::IoError);
    assert_eq!(refused(ranges(ZEROES, &[(0, 8, 0)], &read_only)), Status::IoError);
}

proptest! {
    /// Whatever a request says, it is refused or lies inside of the disk and inside of memory.
    #[test]
    fn any_garbage_is_refused_or_inside(
        kind in prop_oneof![0u32..20, any::<u32>()],
        sector in prop_oneof![0u64..80, any::<u64>()],
        bytes in prop::collection::vec(any::<u8>(), 64),
        parts in prop::collection::vec(
            (prop_oneof![Just(HEAD), 0u64..0x8200, any::<u64>()], prop_oneof![0u32..2000, Just(16), Just(512), any::<u32>()],
             prop_oneof![Just(0u16), Just(WRITE)]),
            1..8,
        ),
    ) {
        let map = map();
        map.memory().write_slice(&bytes, GuestAddress(DATA)).unwrap();
        header(map.memory(), kind, sector);
        let Ok(request) = Request::parse(&chain(map.memory(), &parts), &map, &terms()) else { return Ok(()) };
        let inside = |range: GuestRange| range.end().get() <= CAPACITY;
        let (work, answer) = request.split();
        match &work {
            Work::Read(at, io) | Work::Write(at, io) => {
                prop_assert!(inside(GuestRange::new(*at, io.len() as u64)));
                prop_assert_eq!(io.to_vec().len(), io.len());
            }
            Work::Discard(list) => prop_assert!(list.iter().all(|range| inside(*range))),
            Work::WriteZeroes(list) => prop_assert!(list.iter().all(|(range, _)| inside(*range))),
            Work::Identify(io) => prop_assert!(io.len() <= SERIAL),
            Work::Flush | Work::Refuse(_) => {}
        }
        prop_assert!(answer.give(Status::Ok) >= 1);
    }
}
