//! Who polls a connection: the runtime while its client asks now and then, a thread of its own while it is busy.
//!
//! The runtime waits for thousands of silent clients with one thread and little memory. But on its way from the socket
//! to the connection a request passes the runtime's own scheduling, and that costs more than a warm request does. So a
//! client that goes on asking gets a thread that waits for it alone; after some silence the runtime takes it back. Where
//! requests follow each other closely the thread does not even sleep between them: putting a processor to sleep and
//! waking it takes longer than the client does to ask again.
//!
//! Promises: no connection waits for another one's requests, as long as there are threads to be had; with none, the
//! runtime serves in turns; asking without sleep is limited to [`ASKING`] for each wait, goes on only while it pays off, and
//! lets every other thread go first.
//! Must never: lose a wake-up on the way between the two, or let a thread go on when nobody runs the driver any more.

use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tracing::Span;

use super::stream::{Stream, Wants};

/// A client that lets no more time pass than this, [`BUSY_WAITS`] times in a row, is busy.
const BUSY: Duration = Duration::from_millis(1);
const BUSY_WAITS: u32 = 4;
/// After this much silence a busy client's thread is given up.
const QUIET: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How long a thread asks its socket again and again before it sleeps, if the last [`CLOSE_WAITS`] waits were no longer.
/// To sleep and to be woken takes up to half of it on a virtual machine.
const ASKING: Duration = Duration::from_micros(100);
const CLOSE_WAITS: u32 = 2;
/// The stack of such a thread, in bytes; what is never touched takes no memory.
const STACK_BYTES: usize = 1 << 20;

/// A connection and what is needed to poll it.
pub(super) struct Driver {
    /// Around everything that is logged of it.
    span: Span,
    connection: Pin<Box<dyn Future<Output = ()> + Send>>,
    socket: Arc<OwnedFd>,
    wants: Arc<Wants>,
}

/// Why the runtime polls no further.
enum Left {
    Over,
    Busy,
}

impl Driver {
    /// Drives what `connection` does with the stream over this socket.
    pub(super) fn new<C>(socket: OwnedFd, span: Span, connection: impl FnOnce(Stream) -> C) -> Self
    where
        C: Future<Output = ()> + Send + 'static,
    {
        let (socket, wants) = (Arc::new(socket), Arc::<Wants>::default());
        let stream = Stream::new(Arc::clone(&socket), Arc::clone(&wants));
        Self { span, connection: Box::pin(connection(stream)), socket, wants }
    }

    /// Polls the connection to its end, or until `cut` turns true. `threads`: how many of all connections may have one.
    pub(super) async fn run(self, threads: Arc<Semaphore>, mut cut: watch::Receiver<bool>) {
        let mut driver = self;
        loop {
            let left = tokio::select! {
                left = driver.on_runtime() => left,
                () = super::stopped(&mut cut) => return,
            };
            match left {
                Ok(Left::Busy) => {}
                Ok(Left::Over) => return,
                Err(error) => return tracing::warn!("the connection cannot be waited for: {error}"),
            }
            // With none to be had it stays on the runtime, and tries again when it has been busy for as long once more.
            let Ok(place) = Arc::clone(&threads).try_acquire_owned() else { continue };
            match driver.on_thread(place, &mut cut).await {
                Some(quiet) => driver = quiet,
                None => return,
            }
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        // What it wanted of the socket before, it will say again.
        self.wants.readable.take();
        self.wants.writable.take();
        self.connection.as_mut().poll(context)
    }

    async fn on_runtime(&mut self) -> io::Result<Left> {
        #[allow(
            deprecated,
            reason = "what replaces it is unsafe, for descriptors that may be closed: an Arc keeps this open"
        )]
        let socket = AsyncFd::new(Arc::clone(&self.socket))?;
        let mut pace = Pace::default();
        poll_fn(|context| {
            let span = self.span.clone();
            if span.in_scope(|| self.poll(context)).is_ready() {
                return Poll::Ready(Ok(Left::Over));
            }
            if self.wants.received.take() {
                pace.received(BUSY);
            }
            if pace.has_been_short(BUSY_WAITS) {
                return Poll::Ready(Ok(Left::Busy));
            }
            let mut again = self.wants.put_off.take();
            if self.wants.readable.take()
                && let Poll::Ready(ready) = socket.poll_read_ready(context)
            {
                ready?.clear_ready();
                again = true;
            }
            if self.wants.writable.take()
                && let Poll::Ready(ready) = socket.poll_write_ready(context)
            {
                ready?.clear_ready();
                self.wants.full.take();
                again = true;
            }
            if again {
                // Others on this thread first.
                context.waker().wake_by_ref();
            } else {
                pace.waits();
            }
            Poll::Pending
        })
        .await
    }

    /// Has a thread poll it; `None` once the connection is over, or was cut.
    async fn on_thread(self, place: OwnedSemaphorePermit, cut: &mut watch::Receiver<bool>) -> Option<Self> {
        let bell = match Bell::new() {
            Ok(bell) => Arc::new(bell),
            Err(error) => return self.without_thread(&error),
        };
        // The thread gets the connection once there is a thread: a closure that cannot be started is lost.
        let (hand_over, handed_over) = oneshot::channel::<Self>();
        let (give_back, mut given_back) = oneshot::channel();
        let (runtime, rung) = (Handle::current(), Arc::clone(&bell));
        let started =
            std::thread::Builder::new().name("nbd-client".to_owned()).stack_size(STACK_BYTES).spawn(move || {
                let Ok(driver) = handed_over.blocking_recv() else { return };
                let _runtime = runtime.enter();
                let quiet = driver.poll_here(&rung);
                drop(place);
                // Nobody listens any more only if the runtime is gone.
                let _ = give_back.send(quiet);
            });
        if let Err(error) = started {
            return self.without_thread(&error);
        }
        hand_over.send(self).ok()?;
        // Also if this future is dropped.
        let leaving = Leaving(bell);
        tokio::select! {
            quiet = &mut given_back => return quiet.ok().flatten(),
            () = super::stopped(cut) => {}
        }
        drop(leaving);
        // Whoever cuts it off wants to know it gone.
        let _ = given_back.await;
        None
    }

    fn without_thread(self, error: &io::Error) -> Option<Self> {
        tracing::debug!("a busy connection gets no thread of its own: {error}");
        Some(self)
    }

    /// Polls it on this thread, until it is over (`None`), cut, or quiet.
    fn poll_here(mut self, bell: &Arc<Bell>) -> Option<Self> {
        let _span = self.span.clone().entered();
        let waker = Waker::from(Arc::clone(bell));
        let mut context = Context::from_waker(&waker);
        let mut pace = Pace::default();
        loop {
            bell.answer();
            if bell.is_cut() || self.poll(&mut context).is_ready() {
                return None;
            }
            if self.wants.received.take() {
                pace.received(ASKING);
            }
            if self.wants.put_off.take() || bell.has_rung() {
                continue;
            }
            if pace.waits() < ASKING && pace.has_been_short(CLOSE_WAITS) {
                std::thread::yield_now();
            } else if !self.sleep(bell) {
                return Some(self);
            }
        }
    }

    /// Sleeps until there is something to do; false if that took too long.
    fn sleep(&self, bell: &Bell) -> bool {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, self.wants.readable.take());
        wanted.set(PollFlags::OUT, self.wants.writable.take());
        let mut fds = [PollFd::new(&bell.rope, PollFlags::IN), PollFd::new(&*self.socket, wanted)];
        // A socket that broke would end each wait at once, also one that is not for it.
        let fds = if wanted.is_empty() { &mut fds[..1] } else { &mut fds[..] };
        let ended = poll(fds, Some(&QUIET));
        if !fds[0].revents().is_empty() {
            let _ = rustix::io::read(&bell.rope, &mut [0; 8]);
        }
        // Room, or the socket broke, and a send will say so.
        if fds.get(1).is_some_and(|socket| socket.revents().intersects(!PollFlags::IN)) {
            self.wants.full.take();
        }
        ended != Ok(0)
    }
}

/// How closely a client's requests follow each other.
#[derive(Debug, Default)]
struct Pace {
    /// Since when there has been nothing to do.
    since: Option<Instant>,
    /// How many waits in a row were short.
    short: u32,
}

impl Pace {
    /// How long there has been nothing to do.
    fn waits(&mut self) -> Duration {
        self.since.get_or_insert_with(Instant::now).elapsed()
    }

    /// Something came; the wait for it, if there was one, was a short one if it took less than `short`.
    fn received(&mut self, short: Duration) {
        let waited = self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        self.short = if waited < short { self.short.saturating_add(1) } else { 0 };
    }

    fn has_been_short(&self, times: u32) -> bool {
        self.short >= times
    }
}

/// Wakes a thread that sleeps.
#[derive(Debug)]
struct Bell {
    /// Readable once it was rung.
    rope: OwnedFd,
    rung: AtomicBool,
    cut: AtomicBool,
}

impl Bell {
    fn new() -> io::Result<Self> {
        let rope = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { rope, rung: AtomicBool::new(false), cut: AtomicBool::new(false) })
    }

    fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // It takes 2^64 - 1 of these to fill it.
            let _ = rustix::io::write(&self.rope, &1u64.to_ne_bytes());
        }
    }

    fn has_rung(&self) -> bool {
        self.rung.load(Ordering::Acquire)
    }

    /// What it was rung for is about to be done. The rope stays as it is: it ends the next sleep early, and no more.
    fn answer(&self) {
        self.rung.swap(false, Ordering::AcqRel);
    }

    /// Ends the polling.
    fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.ring();
    }

    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }
}

/// Whoever waits for a thread; the thread stops polling when there is nobody any more.
struct Leaving(Arc<Bell>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.cut();
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ring();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream as Peer;
    use std::thread::ThreadId;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::mpsc;
    use tokio::task::JoinHandle;

    const SOON: Duration = Duration::from_secs(30);

    /// A driven connection that echoes bytes, the socket of its client, and what ends it.
    struct Echo {
        client: tokio::net::UnixStream,
        /// The threads that polled it, byte for byte.
        polled_by: mpsc::UnboundedReceiver<ThreadId>,
        threads: Arc<Semaphore>,
        cut: watch::Sender<bool>,
        run: JoinHandle<()>,
    }

    impl Echo {
        fn start(threads: usize) -> Self {
            let (client, server) = Peer::pair().unwrap();
            client.set_nonblocking(true).unwrap();
            let (tell, polled_by) = mpsc::unbounded_channel();
            let driver = Driver::new(server.into(), Span::none(), async move |mut stream| {
                let mut byte = [0];
                while stream.read_exact(&mut byte).await.is_ok() {
                    tell.send(std::thread::current().id()).unwrap();
                    stream.write_all(&byte).await.unwrap();
                }
            });
            let (threads, cut) = (Arc::new(Semaphore::new(threads)), watch::Sender::new(false));
            let run = tokio::spawn(driver.run(Arc::clone(&threads), cut.subscribe()));
            Self { client: tokio::net::UnixStream::from_std(client).unwrap(), polled_by, threads, cut, run }
        }

        /// Sends a byte and waits for it; which thread echoed it.
        async fn ask(&mut self) -> ThreadId {
            self.client.write_all(&[7]).await.unwrap();
            tokio::time::timeout(SOON, self.client.read_exact(&mut [0])).await.expect("an echo").unwrap();
            self.polled_by.recv().await.unwrap()
        }

        /// Asks without a pause until a thread of its own echoes.
        async fn is_given_a_thread(&mut self) -> bool {
            let (here, patience) = (std::thread::current().id(), Instant::now() + SOON);
            while Instant::now() < patience {
                if self.ask().await != here {
                    return true;
                }
            }
            false
        }
    }

    #[tokio::test]
    async fn a_busy_connection_has_a_thread_of_its_own_until_it_is_quiet() {
        let here = std::thread::current().id();
        let mut echo = Echo::start(1);
        assert_eq!(echo.ask().await, here, "the runtime's");
        for _ in 0..2 {
            assert!(echo.is_given_a_thread().await);
            let back = tokio::time::timeout(SOON, echo.threads.acquire()).await;
            drop(back.expect("the thread is given back").unwrap());
            assert_eq!(echo.ask().await, here, "the runtime's again");
        }
        drop(echo.client);
        echo.run.await.unwrap();
    }

    #[tokio::test]
    async fn without_a_thread_to_be_had_the_runtime_goes_on() {
        let here = std::thread::current().id();
        let mut echo = Echo::start(0);
        for _ in 0..1_000 {
            assert_eq!(echo.ask().await, here);
        }
    }

    #[tokio::test]
    async fn who_cuts_a_connection_off_finds_it_gone_on_a_thread_as_on_the_runtime() {
        for on_thread in [false, true] {
            let mut echo = Echo::start(usize::from(on_thread));
            if on_thread {
                assert!(echo.is_given_a_thread().await);
            }
            echo.cut.send_replace(true);
            tokio::time::timeout(SOON, echo.run).await.expect("it ends").unwrap();
            while echo.polled_by.recv().await.is_some() {}
            assert_eq!(echo.client.read(&mut [0]).await.unwrap(), 0, "its socket is closed");
            assert_eq!(echo.threads.available_permits(), usize::from(on_thread));
        }
    }

    #[tokio::test]
    async fn a_thread_whose_driver_was_dropped_ends_though_its_client_is_busy() {
        let mut echo = Echo::start(1);
        assert!(echo.is_given_a_thread().await);
        echo.run.abort();
        // Its client goes on asking, so it is not that it has become quiet.
        let gone = async {
            while echo.client.write_all(&[7]).await.is_ok() && echo.client.read_exact(&mut [0]).await.is_ok() {}
        };
        tokio::time::timeout(Duration::from_secs(5), gone).await.expect("the connection is dropped");
    }

    #[tokio::test]
    async fn a_connection_that_died_leaves_no_thread_behind() {
        let (client, server) = Peer::pair().unwrap();
        client.set_nonblocking(true).unwrap();
        let mut client = tokio::net::UnixStream::from_std(client).unwrap();
        let driver = Driver::new(server.into(), Span::none(), async |mut stream: Stream| {
            for _ in 0..100 {
                stream.read_exact(&mut [0]).await.unwrap();
                stream.write_all(&[0]).await.unwrap();
            }
            panic!("on purpose");
        });
        let (threads, cut) = (Arc::new(Semaphore::new(1)), watch::Sender::new(false));
        let run = tokio::spawn(driver.run(Arc::clone(&threads), cut.subscribe()));
        while client.write_all(&[7]).await.is_ok() && client.read_exact(&mut [0]).await.is_ok() {}
        let _ = tokio::time::timeout(SOON, run).await.expect("it ends");
        assert_eq!(threads.available_permits(), 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_wake_up_from_another_thread_is_lost_however_the_connection_is_polled() {
        let (client, server) = Peer::pair().unwrap();
        client.set_nonblocking(true).unwrap();
        let mut client = tokio::net::UnixStream::from_std(client).unwrap();
        // Each byte goes to a task and comes back from it: the connection waits for its socket and for that task in turn.
        let (there, mut asked) = mpsc::unbounded_channel();
        let (answer, mut back) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(byte) = asked.recv().await {
                answer.send(byte).unwrap();
            }
        });
        let driver = Driver::new(server.into(), Span::none(), async move |mut stream| {
            let mut byte = [0];
            while stream.read_exact(&mut byte).await.is_ok() {
                there.send(byte).unwrap();
                stream.write_all(&back.recv().await.unwrap()).await.unwrap();
            }
        });
        let cut = watch::Sender::new(false);
        let run = tokio::spawn(driver.run(Arc::new(Semaphore::new(1)), cut.subscribe()));
        for round in 0..20_000u32 {
            // Now and then long enough for the thread to sleep, or to be given up.
            if round % 500 == 499 {
                tokio::time::sleep(Duration::from_millis(u64::from(round % 3) * 60)).await;
            }
            client.write_all(&[1]).await.unwrap();
            tokio::time::timeout(SOON, client.read_exact(&mut [0])).await.expect("woken").unwrap();
        }
        drop(client);
        run.await.unwrap();
    }

    #[test]
    fn only_waits_that_are_short_in_a_row_count() {
        let mut pace = Pace::default();
        for _ in 0..3 {
            pace.received(Duration::from_secs(1));
        }
        assert!(pace.has_been_short(3) && !pace.has_been_short(4));
        pace.waits();
        pace.received(Duration::ZERO);
        assert!(!pace.has_been_short(1), "a long one ends the row");
    }
}
