use futures_util::stream;
use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn cutting_keeps_every_byte_in_order_and_all_parts_but_the_last_full(
        lengths in prop::collection::vec(0usize..50, 0..40),
        part_bytes in 1u64..70,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut counter = 0u8;
        let pieces: Vec<Bytes> = lengths
            .iter()
            .map(|len| (0..*len).map(|_| { counter = counter.wrapping_add(1); counter }).collect())
            .collect();
        let whole: Vec<u8> = pieces.concat();
        let (parts, total) = runtime.block_on(cut(pieces, part_bytes));
        prop_assert_eq!(total, whole.len() as u64);
        prop_assert_eq!(parts.concat(), whole);
        let full = parts.iter().take(parts.len().saturating_sub(1)).all(|part| part.len() as u64 == part_bytes);
        prop_assert!(full && parts.iter().all(|part| !part.is_empty()));
    }
}

/// All parts of a body, and the total it came to.
async fn cut(pieces: Vec<Bytes>, part_bytes: u64) -> (Vec<Vec<u8>>, u64) {
    let key: Key = "blob".parse().unwrap();
    let body = stream::iter(pieces.into_iter().map(Ok)).boxed();
    let mut cutter = Cutter { body, rest: Bytes::new(), total: 0, max_bytes: u64::MAX };
    let mut parts = Vec::new();
    loop {
        // Asking whether it has ended must not lose a byte.
        let ended = cutter.ended(&key).await.unwrap();
        let part = cutter.part(&key, part_bytes).await.unwrap();
        assert_eq!(ended, part.len == 0);
        assert_eq!(part.pieces.iter().map(|piece| piece.len() as u64).sum::<u64>(), part.len);
        if ended {
            return (parts, cutter.total);
        }
        parts.push(part.pieces.concat());
    }
}

#[tokio::test]
async fn pieces_are_cut_without_being_copied() {
    let key: Key = "blob".parse().unwrap();
    let piece = Bytes::from(vec![7; 100]);
    let body = stream::iter([Ok(piece.clone())]).boxed();
    let mut cutter = Cutter { body, rest: Bytes::new(), total: 0, max_bytes: u64::MAX };
    for offset in [0, 40, 80] {
        let part = cutter.part(&key, 40).await.unwrap();
        assert_eq!(part.pieces[0].as_ptr(), piece[offset..].as_ptr());
    }
}
