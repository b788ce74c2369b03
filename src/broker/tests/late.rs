//! A keeper from before a restart that can be asked before it has told what it has.

use super::*;
use crate::broker::{Keepers, Waiting};
use crate::process::holders::{Report, Search};
use crate::process::kept::KeptKeeper;
use crate::process::launcher::Standing;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use tokio::task::{spawn_local, yield_now};

const NIC: &str = "0000:02:00.0";

/// The keepers of a world, of which the first that is found tells what it has when it is let.
struct Late {
    keepers: Rc<Threads>,
    let_go: RefCell<Option<Receiver<()>>>,
    /// It has told, and nobody has heard it.
    told: Arc<AtomicBool>,
}

impl Late {
    /// A link on which what comes from the keeper waits.
    fn held_back(&self, watch: OwnedFd, let_go: Receiver<()>) -> OwnedFd {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let (mut broker, mut keeper) = (theirs, UnixStream::from(watch));
        keeper.set_nonblocking(false).unwrap();
        let told = Arc::clone(&self.told);
        std::thread::spawn(move || -> std::io::Result<()> {
            let mut buffer = [0; 1 << 16];
            let len = broker.read(&mut buffer)?;
            keeper.write_all(&buffer[..len])?;
            loop {
                let len = keeper.read(&mut buffer)?;
                if !told.swap(true, Ordering::SeqCst) {
                    let _ = let_go.recv();
                }
                match len {
                    0 => return Ok(()),
                    len => broker.write_all(&buffer[..len])?,
                }
            }
        });
        ours.into()
    }
}

impl Keepers for Late {
    fn start<'a>(&'a self, name: &'a str) -> Waiting<'a, [OwnedFd; 2]> {
        self.keepers.start(name)
    }

    fn find<'a>(&'a self, name: &'a str) -> Waiting<'a, (Standing, Option<[OwnedFd; 2]>)> {
        Box::pin(async move {
            let (standing, links) = self.keepers.find(name).await?;
            let links = links.map(|[ask, watch]| match self.let_go.take() {
                Some(let_go) => [ask, self.held_back(watch, let_go)],
                None => [ask, watch],
            });
            Ok((standing, links))
        })
    }

    fn salvage<'a>(&'a self, name: &'a str) -> Waiting<'a, ()> {
        self.keepers.salvage(name)
    }

    fn kept<'a>(&'a self, after: &'a str) -> Waiting<'a, Vec<KeptKeeper>> {
        self.keepers.kept(after)
    }

    fn look<'a>(&'a self, search: &'a Search) -> Waiting<'a, Report> {
        self.keepers.look(search)
    }
}

/// Another broker in place of a world's; its keeper has told nothing until it is let, and then set `told`.
fn restarted_late(world: World) -> (World, Sender<()>, Arc<AtomicBool>) {
    let World { local, broker, keepers, sim, runtime, witness } = world;
    drop((local, broker, runtime));
    let (sender, receiver) = channel();
    let told = Arc::new(AtomicBool::new(false));
    let (let_go, own) = (RefCell::new(Some(receiver)), Rc::clone(&keepers));
    let late = Late { keepers: own, let_go, told: Arc::clone(&told) };
    let broker = Broker::new(Parts {
        kernel: sim.kernel(),
        policy: Arc::new(parsed(POLICY)),
        observer: Rc::clone(&witness) as Rc<dyn Observer>,
        keepers: Box::new(late),
        patience: Duration::ZERO,
        deadline: LIMIT,
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let world = World { local: LocalSet::new(), broker, witness, keepers, sim, runtime };
    world.run(async { world.broker.adopt().await }).unwrap();
    (world, sender, told)
}

#[test]
fn calls_wait_until_a_keeper_from_before_a_restart_has_told_its_mappings() {
    let world = World::new();
    let grant = world.acquire(1000, &want_as(Handout::Devices, &[NIC])).unwrap();
    world.map(1000, &grant.reply, 0, 4096).unwrap();
    let (world, let_go, told) = restarted_late(world);
    let (broker, held) = (Rc::clone(&world.broker), grant.reply.clone());
    world.run(async {
        let mapping = spawn_local(async move { map(&broker, 1000, &held, 4096, 4096).await });
        // From then on there is a way to it.
        until(|| told.load(Ordering::SeqCst)).await;
        for _ in 0..100 {
            yield_now().await;
        }
        let known = world.ledger().leases().map(|lease| lease.mappings.len()).sum::<usize>();
        assert!(known == 0 && !mapping.is_finished(), "it was asked before it had told");
        let_go.send(()).unwrap();
        mapping.await.unwrap().unwrap();
    });
    for iova in [0, 4096] {
        assert_eq!(world.unmap(1000, &grant.reply, iova, 4096), Ok(4096), "at {iova}");
    }
    drop(grant);
    world.serve_hang_ups();
    world.until(|| world.stats().is_idle() && world.ledger() == crate::ledger::Ledger::default());
}
