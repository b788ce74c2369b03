//! The link to the launcher, which starts every process that the broker needs.

use crate::broker::{Keepers, Waiting};
use crate::process::holders::{Report, Search};
use crate::process::kept::{self, KeptKeeper};
use crate::process::launcher::{
    FAILED, Failed, FindKeeper, ReadKeepers, Salvage, Standing, StartKeeper, Told, Watch,
};
use crate::process::link::{self, Answer, Asking, Call, Lost};
use std::cell::RefCell;
use std::fs::File;
use std::io::{Error, Read, Result, Seek};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, spawn_local};

/// The end of the link that asks. Lives on the event loop.
#[derive(Debug)]
pub(super) struct LauncherLink {
    asked: mpsc::UnboundedSender<Asked>,
    /// The process that looked for holders last, where it does not end.
    pub(super) looker: RefCell<Option<OwnedFd>>,
}

/// A call, and what is done with its answer.
struct Asked {
    call: Vec<u8>,
    take: Box<dyn FnOnce(Answered) -> std::result::Result<(), Lost>>,
}

/// The parameters of a reply, and the files that came with it.
type Answered = Result<(String, Vec<OwnedFd>)>;

/// What the launcher tells.
#[derive(Debug)]
pub(super) struct Orders(Asking);

impl LauncherLink {
    /// Takes the link; what ends is the link, which is the broker's end as well: without it nothing can be
    /// started. Within a [`LocalSet`](tokio::task::LocalSet).
    pub(super) fn new(link: OwnedFd) -> Result<(Rc<Self>, JoinHandle<Lost>)> {
        let (asked, asks) = mpsc::unbounded_channel();
        let end = spawn_local(ask_each(Asking::new(link)?, asks));
        Ok((Rc::new(Self { asked, looker: RefCell::default() }), end))
    }

    /// Makes a call; gives its reply, and the files that came with it. A call that nobody waits for any
    /// more comes to its end as well.
    ///
    /// # Errors
    /// What the launcher says, or that it is no more.
    pub(super) async fn ask<C: Call>(&self, call: &C) -> Result<(C::Reply, Vec<OwnedFd>)> {
        self.ask_for_files(call, None).await
    }

    /// The same, where so many files belong to the reply.
    async fn ask_for_files<C: Call>(
        &self,
        call: &C,
        files: Option<usize>,
    ) -> Result<(C::Reply, Vec<OwnedFd>)> {
        let (sender, answered) = oneshot::channel();
        // Whether anybody waits for it or not, an answer that is none is no answer to the next call either.
        let take = move |answer: Answered| {
            let (answer, end) = match answer.map(|(text, fds)| reply::<C>(&text, fds, files)) {
                Ok(Ok(reply)) => (Ok(reply), Ok(())),
                Ok(Err(lost)) => (Err(Error::other(lost.clone())), Err(lost)),
                Err(error) => (Err(error), Ok(())),
            };
            let _ = sender.send(answer);
            end
        };
        let asked = Asked { call: link::call(call, false), take: Box::new(take) };
        self.asked.send(asked).map_err(|_| no_more())?;
        answered.await.map_err(|_| no_more())?
    }

    /// Listens, on a link of its own, to what the launcher tells.
    pub(super) async fn watch(&self, link: OwnedFd) -> Result<Orders> {
        let link = Asking::new(link)?;
        link.send(&link::call(&Watch {}, true), &[]).await.map_err(Error::other)?;
        Ok(Orders(link))
    }
}

impl Orders {
    /// The next that is told, with what came with it; `None` where there is no launcher any more.
    pub(super) async fn next(&mut self) -> Option<(Told, Vec<OwnedFd>)> {
        match self.0.next_answer().await {
            Ok(Answer::Reply(parameters, fds)) => {
                serde_json::from_str(&parameters).ok().map(|told| (told, fds))
            }
            _ => None,
        }
    }
}

/// One call after the other.
async fn ask_each(mut link: Asking, mut asks: mpsc::UnboundedReceiver<Asked>) -> Lost {
    while let Some(Asked { call, take }) = asks.recv().await {
        let answered = match ask(&mut link, &call).await {
            Ok(Answer::Reply(parameters, fds)) => Ok((parameters, fds)),
            Ok(Answer::Error(name, parameters)) if name == FAILED => {
                Err(serde_json::from_str::<Failed>(&parameters)
                    .map_or_else(Into::into, |failed| failed.errno().into()))
            }
            Ok(Answer::Error(name, _)) => Err(Error::other(name)),
            Err(lost) => {
                let _ = take(Err(Error::other(lost.clone())));
                return lost;
            }
        };
        // What nobody waits for is closed, and with its link whatever was started ends.
        if let Err(malformed) = take(answered) {
            return malformed;
        }
    }
    Lost::Closed
}

async fn ask(link: &mut Asking, call: &[u8]) -> std::result::Result<Answer, Lost> {
    link.send(call, &[]).await?;
    link.next_answer().await
}

fn no_more() -> Error {
    Error::other("the launcher is no more")
}

/// What a reply says, with its files.
fn reply<C: Call>(
    text: &str,
    fds: Vec<OwnedFd>,
    files: Option<usize>,
) -> std::result::Result<(C::Reply, Vec<OwnedFd>), Lost> {
    let malformed = |why: String| Lost::Malformed(format!("{}: {why}", C::NAME));
    if files.is_some_and(|files| files != fds.len()) {
        return Err(malformed(format!("{} files came with it", fds.len())));
    }
    Ok((serde_json::from_str(text).map_err(|error| malformed(error.to_string()))?, fds))
}

/// The files of a reply, which has so many.
fn files<const N: usize>(fds: Vec<OwnedFd>) -> Result<[OwnedFd; N]> {
    fds.try_into().map_err(|_| Error::other("the launcher sent other files than it should"))
}

/// All that is in a file that came with an answer, wherever it was left.
pub(super) fn whole(file: OwnedFd) -> Result<Vec<u8>> {
    let (mut file, mut bytes) = (File::from(file), Vec::new());
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Keepers for Rc<LauncherLink> {
    fn start<'a>(&'a self, name: &'a str) -> Waiting<'a, [OwnedFd; 2]> {
        Box::pin(async move {
            let (_, fds) = self.ask_for_files(&StartKeeper { name: name.into() }, Some(2)).await?;
            files(fds)
        })
    }

    fn find<'a>(&'a self, name: &'a str) -> Waiting<'a, (Standing, Option<[OwnedFd; 2]>)> {
        Box::pin(async move {
            let (found, fds) = self.ask(&FindKeeper { name: name.into() }).await?;
            Ok((found.standing, files(fds).ok()))
        })
    }

    fn salvage<'a>(&'a self, name: &'a str) -> Waiting<'a, ()> {
        Box::pin(async move { self.ask(&Salvage { name: name.into() }).await.map(drop) })
    }

    fn kept<'a>(&'a self, after: &'a str) -> Waiting<'a, Vec<KeptKeeper>> {
        Box::pin(async move {
            let (_, fds) = self.ask(&ReadKeepers { after: after.into() }).await?;
            let [file] = files(fds)?;
            kept::parse(&whole(file)?)
        })
    }

    fn look<'a>(&'a self, search: &'a Search) -> Waiting<'a, Report> {
        Box::pin(super::holders::look(self, search))
    }
}
