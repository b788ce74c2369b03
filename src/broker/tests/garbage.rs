//! Keepers that answer garbage, or never, or whose link breaks.

use super::*;
use crate::broker::{Keepers, Waiting};
use crate::process::holders::{Report, Search};
use crate::process::kept::KeptKeeper;
use crate::process::launcher::Standing;
use nix::errno::Errno;
use std::future::ready;
use std::io::{Read, Write};
use std::time::Instant;

/// What a keeper says to whatever it is asked; nothing at all is its end.
const ANSWERS: [&[u8]; 9] = [
    b"",
    b"\0",
    b"{\0",
    b"\xff\xfe\0",
    b"[]\0",
    b"{}\0",
    b"{\"parameters\":{}}\0",
    b"{\"error\":\"org.vfiobroker.Keeper.Failed\",\"parameters\":{\"failure\":\"odd\"}}\0",
    b"{\"error\":\"no.such.Error\"}\0",
];

/// Keepers of one kind; `None` never says anything.
struct Odd(Option<&'static [u8]>);

impl Keepers for Odd {
    fn start<'a>(&'a self, _: &'a str) -> Waiting<'a, [OwnedFd; 2]> {
        let answer = self.0;
        let link = || {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            std::thread::spawn(move || {
                while matches!(theirs.read(&mut [0; 4096]), Ok(1..)) {
                    match answer {
                        None => {}
                        Some([]) => break,
                        Some(bytes) => drop(theirs.write_all(bytes)),
                    }
                }
            });
            OwnedFd::from(ours)
        };
        Box::pin(ready(Ok([link(), link()])))
    }

    fn find<'a>(&'a self, _: &'a str) -> Waiting<'a, (Standing, Option<[OwnedFd; 2]>)> {
        Box::pin(ready(Ok((Standing::Gone, None))))
    }

    fn salvage<'a>(&'a self, _: &'a str) -> Waiting<'a, ()> {
        Box::pin(ready(Err(Errno::EAGAIN.into())))
    }

    fn kept<'a>(&'a self, _: &'a str) -> Waiting<'a, Vec<KeptKeeper>> {
        Box::pin(ready(Ok(Vec::new())))
    }

    fn look<'a>(&'a self, _: &'a Search) -> Waiting<'a, Report> {
        Box::pin(ready(Err(Errno::EAGAIN.into())))
    }
}

/// A broker with such keepers, which waits so long for them.
fn broker(sim: &Sim, answer: Option<&'static [u8]>, deadline: Duration) -> Rc<Broker> {
    Broker::new(Parts {
        kernel: sim.kernel(),
        policy: Arc::new(parsed(POLICY)),
        observer: Rc::new(()),
        keepers: Box::new(Odd(answer)),
        patience: Duration::ZERO,
        deadline,
    })
}

#[test]
fn a_keeper_that_answers_garbage_is_an_error_and_keeps_nothing_from_anybody() {
    let sim = simulation(MACHINE);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for answer in ANSWERS {
        let said = String::from_utf8_lossy(answer);
        let broker = broker(&sim, Some(answer), LIMIT);
        LocalSet::new().block_on(&runtime, async {
            for handout in [Handout::Container, Handout::Iommufd] {
                let request = want_as(handout, &["0000:02:00.0"]);
                let error = acquire(&broker, 1000, &request).await.unwrap_err();
                let is_typed = matches!(error, Error::Conflict { .. } | Error::Busy { .. });
                assert!(!is_typed, "{said}: {error}");
                until(|| broker.books().ledger == crate::ledger::Ledger::default()).await;
            }
        });
    }
}

#[test]
fn a_keeper_that_never_answers_is_waited_for_until_the_deadline() {
    let sim = simulation(MACHINE);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let deadline = Duration::from_millis(50);
    let broker = broker(&sim, None, deadline);
    LocalSet::new().block_on(&runtime, async {
        let began = Instant::now();
        let error = acquire(&broker, 1000, &want(&["0000:02:00.0"])).await.unwrap_err();
        assert!(began.elapsed() >= deadline);
        assert!(error.to_string().contains("Acquire"), "{error}");
        // What it may have opened is nobody else's, and nobody else's is held up.
        let error = acquire(&broker, 1001, &want(&["0000:02:00.0"])).await.unwrap_err();
        assert!(matches!(error, Error::Busy { .. }), "{error}");
        assert_eq!(broker.books().ledger.groups().count(), 1);
    });
}
