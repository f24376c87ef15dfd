use super::*;

const MIB: usize = 1 << 20;
const TOTAL: usize = 1 << 30;
/// What one client may have in flight.
const MOST: usize = 64 * MIB;
const HOLD: Duration = Duration::from_secs(60);

fn shares() -> Arc<Shares> {
    Shares::new(TOTAL, HOLD)
}

fn clients(shares: &Arc<Shares>, count: usize) -> Vec<Arc<Account>> {
    (0..count).map(|nth| shares.account(&format!("vm-{nth}"))).collect()
}

/// Takes requests of `bytes` until no more fit; returns how much that is.
fn fill(account: &Arc<Account>, bytes: usize) -> usize {
    (0..MOST / bytes).take_while(|_| account.try_take(bytes)).count() * bytes
}

/// `give_back` undoes `take`, in whatever order.
#[test]
fn what_is_given_back_is_free_and_leaves_no_trace() {
    let shares = shares();
    let accounts = clients(&shares, 3);
    for account in accounts.iter().chain(&accounts) {
        assert!(account.try_take(MIB));
    }
    accounts.iter().rev().for_each(|account| account.give_back(2 * MIB));
    let state = shares.state.lock();
    assert_eq!((state.free, state.holders.len(), state.exports.len()), (TOTAL, 0, 0));
}

#[test]
fn every_grant_leaves_room_for_others_whatever_was_granted_before() {
    let steps = |most: usize| (0..=32).map(move |step| most / 32 * step);
    for free in steps(TOTAL) {
        for held in steps(MOST) {
            for of_export in steps(TOTAL - free) {
                for wanted in [1, 256 << 10, MIB, 32 * MIB] {
                    let granted = fits(TOTAL, free, held, of_export, wanted);
                    let leaves = |rest: usize| rest >= CLIENT_LEAVES * (held + wanted);
                    let leaves = |rest: usize| leaves(rest) && EXPORT_TAKES * rest >= of_export + wanted;
                    assert_eq!(granted, free == TOTAL || free.checked_sub(wanted).is_some_and(leaves));
                }
            }
        }
    }
    assert!(fits(MIB, MIB, 0, 0, MIB), "a request with nothing beside it fits, even if it takes all");
    assert!(!fits(MIB, MIB, 0, 0, MIB + 1));
    assert!(fits(TOTAL, TOTAL, 0, 0, 32 * MIB) && fits(TOTAL, TOTAL - 32 * MIB, 32 * MIB, 32 * MIB, 32 * MIB));
}

#[test]
fn greedy_clients_leave_room_for_a_request_of_a_mebibyte_whenever_they_come() {
    for (count, bytes) in [(17, MIB), (34, 32 * MIB), (40, MIB), (64, 4 * MIB), (1_000, 32 * MIB)] {
        // One after the other; and side by side.
        let one_by_one = shares();
        let first = fill(&clients(&one_by_one, 1)[0], bytes);
        assert_eq!(first, MOST, "alone a client gets all that a connection may have");
        let held: Vec<usize> = clients(&one_by_one, count).iter().map(|account| fill(account, bytes)).collect();
        assert!(one_by_one.account("another").try_take(MIB), "{count} clients hold {held:?}");
        let side_by_side = shares();
        let accounts = clients(&side_by_side, count);
        while accounts.iter().filter(|account| account.try_take(bytes)).count() > 0 {}
        assert!(side_by_side.account("another").try_take(MIB), "{count} clients side by side");
    }
}

#[test]
fn the_clients_of_one_export_leave_a_quarter_to_others() {
    let shares = shares();
    for _ in 0..1_000 {
        fill(&shares.account("vm"), 256 << 10);
    }
    assert!(shares.free() >= TOTAL / 4);
    assert!(!shares.account("vm").try_take(MIB));
    assert!(shares.account("another").try_take(MIB));
}

#[test]
fn the_minimum_rate_is_what_is_held_in_the_time_for_it() {
    let second = Duration::from_secs(1);
    for held in [256 << 10, MIB, 32 * MIB, MOST] {
        let needed = (held as u64).div_ceil(60);
        assert!(!is_too_slow(held, needed, second, HOLD), "{held}");
        assert!(is_too_slow(held, needed - 1, second, HOLD), "{held}");
        assert!(!is_too_slow(held, needed * 5, second * 5, HOLD), "{held}");
    }
    assert!(is_too_slow(1, 0, second, HOLD));
}

/// Shares of which one client holds all; another one, that wants a part.
fn used_up() -> (Arc<Account>, Arc<Account>) {
    let shares = shares();
    let (greedy, modest) = (shares.account("vm-1"), shares.account("vm-2"));
    assert!(greedy.try_take(TOTAL) && !modest.try_take(MIB));
    (greedy, modest)
}

async fn is_cut(account: &Account) -> bool {
    tokio::time::timeout(Duration::ZERO, account.is_cut_off()).await.is_ok()
}

#[tokio::test(start_paused = true)]
async fn a_client_that_moves_too_little_is_cut_off_while_others_wait_and_not_before() {
    let (greedy, modest) = used_up();
    let _waits = tokio::spawn({
        let greedy = Arc::clone(&greedy);
        async move { while greedy.client(std::future::pending::<()>()).await.is_err() {} }
    });
    // A byte now and then is progress enough as long as no request waits.
    for _ in 0..600 {
        sleep(Duration::from_secs(1)).await;
        greedy.moved(1);
    }
    assert!(!is_cut(&greedy).await);
    let waiting = tokio::spawn(async move { modest.take(MIB).await });
    let begun = Instant::now();
    greedy.is_cut_off().await;
    assert!((5..15).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    assert!(!waiting.is_finished());
    greedy.give_back(TOTAL);
    waiting.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_client_is_not_cut_off_that_moves_enough_or_waits_for_the_server_or_holds_less() {
    // It moves what it holds within a minute.
    let (greedy, modest) = used_up();
    let held_up = greedy.client(sleep(HOLD * 2));
    let moving = async {
        for _ in 0..50 {
            greedy.moved(TOTAL.div_ceil(50));
            sleep(Duration::from_secs(1)).await;
        }
        greedy.give_back(TOTAL);
    };
    let ((), _, ()) = tokio::join!(moving, held_up, modest.take(MIB));
    assert!(!is_cut(&greedy).await);

    // The server has its requests in hand.
    let (greedy, modest) = used_up();
    assert!(tokio::time::timeout(HOLD * 3, modest.take(MIB)).await.is_err());
    assert!(!is_cut(&greedy).await);

    // It holds less than the request wants that waits.
    let shares = shares();
    let (small, greedy, modest) = (shares.account("vm-1"), shares.account("vm-2"), shares.account("vm-3"));
    assert!(small.try_take(MIB - 1) && greedy.try_take(MOST));
    shares.state.lock().free = 0;
    let (slow, slower) = (small.client(sleep(HOLD)), greedy.client(sleep(HOLD)));
    let (_, _, waited) = tokio::join!(slow, slower, tokio::time::timeout(HOLD, modest.take(MIB)));
    assert!(waited.is_err() && is_cut(&greedy).await && !is_cut(&small).await);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_has_waited_for_long_is_not_overtaken() {
    let shares = shares();
    let accounts = clients(&shares, 30);
    for account in &accounts {
        fill(account, MIB);
    }
    let (large, small) = (shares.account("large"), shares.account("small"));
    let mut waiting = std::pin::pin!(large.take(32 * MIB));
    assert!(tokio::time::timeout(Duration::from_secs(1), waiting.as_mut()).await.is_err());
    assert!(small.try_take(MIB), "for a while others go first");
    assert!(tokio::time::timeout(HOLD / PART, waiting.as_mut()).await.is_err());
    assert!(!small.try_take(MIB));
    let mut behind = std::pin::pin!(small.take(MIB));
    assert!(tokio::time::timeout(Duration::from_secs(1), behind.as_mut()).await.is_err());
    for account in &accounts {
        let held = shares.state.lock().held(account);
        account.give_back(held);
    }
    tokio::join!(waiting, behind);
}

/// Export "a" at its bound by clients that give nothing back.
fn filled_by_one_export() -> Arc<Shares> {
    let shares = shares();
    while fill(&shares.account("a"), MIB) > 0 {}
    assert!(shares.free() > 200 * MIB);
    shares
}

/// Begins to wait for memory.
fn line_up(account: &Arc<Account>, bytes: usize) -> tokio::task::JoinHandle<()> {
    let account = Arc::clone(account);
    tokio::spawn(async move { account.take(bytes).await })
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_for_its_own_export_holds_up_no_other() {
    let shares = filled_by_one_export();
    let (first, newcomer, other) = (shares.account("a"), shares.account("a"), shares.account("b"));
    let waiting = line_up(&first, 32 * MIB);
    sleep(HOLD).await;
    assert!(!waiting.is_finished());
    assert!(other.try_take(MIB) && !newcomer.try_take(1), "it is overtaken by other exports alone");
    let taken = tokio::time::timeout(HOLD / PART * 2, shares.account("c").take(32 * MIB)).await;
    assert!(taken.is_ok(), "what waits behind it, too");
    waiting.abort();
}

#[tokio::test(start_paused = true)]
async fn a_large_request_is_granted_once_it_has_waited_for_long_and_is_there() {
    let shares = shares();
    for account in clients(&shares, 16) {
        fill(&account, MIB);
    }
    let large = shares.account("large");
    assert!(shares.free() > 43 * MIB && shares.free() < 9 * 32 * MIB && !large.try_take(32 * MIB));
    let begun = Instant::now();
    assert!(tokio::time::timeout(HOLD, large.take(32 * MIB)).await.is_ok());
    assert!(begun.elapsed() >= HOLD / PART);
}

#[tokio::test(start_paused = true)]
async fn exports_with_many_waiting_requests_take_turns_with_one_that_has_few() {
    let (greedy, _) = used_up();
    let shares = Arc::clone(&greedy.shares);
    let many: Vec<_> = (0..300).map(|_| line_up(&shares.account("a"), 32 * MIB)).collect();
    sleep(Duration::from_millis(1)).await;
    let few = line_up(&shares.account("b"), MIB);
    sleep(Duration::from_millis(1)).await;
    greedy.give_back(200 * MIB);
    sleep(Duration::from_millis(1)).await;
    assert!(few.is_finished());
    many.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(start_paused = true)]
async fn a_client_of_the_same_export_is_served_past_those_that_wait_for_themselves() {
    let shares = shares();
    let greedy: Vec<_> = (0..10).map(|_| shares.account("a")).collect();
    for account in &greedy {
        fill(account, MIB);
    }
    let lines: Vec<_> = greedy.iter().map(|account| line_up(account, 32 * MIB)).collect();
    sleep(Duration::from_millis(1)).await;
    let modest = shares.account("a");
    assert!(tokio::time::timeout(HOLD / PART, modest.take(MIB)).await.is_ok());
    lines.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_no_longer_waits_leaves_its_place_and_what_it_was_granted() {
    let (greedy, modest) = used_up();
    let shares = Arc::clone(&greedy.shares);
    assert!(tokio::time::timeout(Duration::from_secs(1), modest.take(MIB)).await.is_err());
    assert!(shares.state.lock().waiting.is_empty());
    let mut granted = Box::pin(modest.take(MIB));
    assert!(tokio::time::timeout(Duration::from_millis(1), granted.as_mut()).await.is_err());
    greedy.give_back(TOTAL);
    assert_eq!(shares.free(), TOTAL - MIB);
    drop(granted);
    assert_eq!(shares.free(), TOTAL);
}
