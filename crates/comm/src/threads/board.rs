//! One call, as all its members see it: who has posted what, and what was taken.

use std::sync::Arc;
use std::time::Instant;

use crate::error::CallSite;
use crate::transport::{Call, Landing, Piece};

/// What one member sends, per member.
pub(super) type Sends = Vec<Vec<Piece>>;

/// One member's side of the call.
pub(super) struct Post {
    pub site: CallSite,
    element: &'static str,
    /// None once the member has left.
    sends: Option<Arc<Sends>>,
    /// Bytes sent to each member.
    bytes: Vec<u64>,
    /// Bytes expected from each member.
    expects: Vec<u64>,
    /// A sum, which takes everything at once.
    at_once: bool,
    synchronise: bool,
    cancelled: bool,
    /// Members from which bytes are still to be taken.
    receives_left: usize,
    /// Members which have still to take bytes.
    sends_left: usize,
}

/// A call on which members meet.
pub(super) struct Board {
    pub members: Arc<[usize]>,
    posts: Vec<Option<Post>>,
    posted: usize,
    /// `[from * members + to]`
    taken: Vec<bool>,
    /// `[from * members + to]` when what is sent arrives, where a link is pretended.
    arrivals: Vec<Option<Instant>>,
    left: usize,
    /// Two posts do not match, so nobody takes anything.
    pub conflict: bool,
}

impl Board {
    pub fn new(members: Arc<[usize]>) -> Self {
        let size = members.len();
        Self {
            members,
            posts: (0..size).map(|_| None).collect(),
            posted: 0,
            taken: vec![false; size * size],
            arrivals: Vec::new(),
            left: size,
            conflict: false,
        }
    }

    /// Adds the side of member `me`.
    pub fn post(&mut self, me: usize, mut post: Post) {
        for (peer, other) in self.posts.iter().enumerate() {
            let Some(other) = other else { continue };
            self.conflict |= post.disagrees(other, me, peer).is_some();
            if other.cancelled && post.bytes[peer] > 0 {
                self.taken[me * self.members.len() + peer] = true;
                post.sends_left -= 1;
            }
        }
        self.conflict |= post.bytes[me] != post.expects[me];
        self.posts[me] = Some(post);
        self.posted += 1;
    }

    pub fn all_posted(&self) -> bool {
        self.posted == self.members.len()
    }

    pub fn site(&self, position: usize) -> Option<&CallSite> {
        self.posts[position].as_ref().map(|post| &post.site)
    }

    /// What member `from` sends to member `to` arrives at `when`.
    pub fn delay(&mut self, from: usize, to: usize, when: Instant) {
        let size = self.members.len();
        self.arrivals.resize(size * size, None);
        self.arrivals[from * size + to] = Some(when);
    }

    /// When the next of what member `me` still expects arrives after `now`.
    pub fn next_arrival(&self, me: usize, now: Instant) -> Option<Instant> {
        let size = self.members.len();
        let pending = (0..size).filter(|peer| self.posts[*peer].is_some() && !self.was_taken(*peer, me));
        pending.filter_map(|peer| *self.arrivals.get(peer * size + me)?).filter(|when| *when > now).min()
    }

    fn has_arrived(&self, from: usize, to: usize, now: Option<Instant>) -> bool {
        let when = self.arrivals.get(from * self.members.len() + to).copied().flatten();
        when.is_none_or(|when| now.is_none_or(|now| when <= now))
    }

    /// What member `me` can take at `now` (without it, sooner or later): senders and what they send.
    pub fn ready(&self, me: usize, now: Option<Instant>) -> Vec<(usize, Arc<Sends>)> {
        let mut found = Vec::new();
        let Some(post) = &self.posts[me] else { return found };
        if self.conflict || post.receives_left == 0 {
            return found;
        }
        for peer in 0..self.members.len() {
            if post.expects[peer] == 0 || self.was_taken(peer, me) {
                continue;
            }
            match &self.posts[peer] {
                Some(other) if self.has_arrived(peer, me, now) => {
                    found.extend(other.sends.iter().map(|sends| (peer, Arc::clone(sends))));
                }
                _ if post.at_once => return Vec::new(),
                _ => {}
            }
        }
        found
    }

    /// Notes that member `to` took what `from` sent. Returns whether that was the last of what `from` sent.
    pub fn take(&mut self, from: usize, to: usize) -> bool {
        let size = self.members.len();
        self.taken[from * size + to] = true;
        if let Some(post) = &mut self.posts[to] {
            post.receives_left -= 1;
        }
        let Some(post) = &mut self.posts[from] else { return false };
        post.sends_left -= 1;
        post.sends_left == 0
    }

    /// Whether member `me` has everything and everything of it was taken.
    pub fn complete(&self, me: usize) -> bool {
        self.posts[me].as_ref().is_some_and(|post| {
            !self.conflict
                && post.receives_left == 0
                && post.sends_left == 0
                && (!post.synchronise || self.all_posted())
        })
    }

    /// The positions member `me` waits for.
    pub fn missing(&self, me: usize) -> Vec<usize> {
        let Some(post) = &self.posts[me] else { return Vec::new() };
        let waits = |peer: &usize| {
            let peer = *peer;
            let absent = self.posts[peer].is_none();
            (absent && (post.synchronise || self.conflict))
                || (post.expects[peer] > 0 && !self.was_taken(peer, me) && (absent || self.conflict))
                || (post.bytes[peer] > 0 && !self.was_taken(me, peer))
        };
        (0..self.members.len()).filter(|peer| *peer != me).filter(waits).collect()
    }

    pub fn has_posted(&self, position: usize) -> bool {
        self.posts[position].is_some()
    }

    /// Member `me` is done: what it sent, to be let go, and whether all members are done.
    pub fn leave(&mut self, me: usize) -> (Option<Arc<Sends>>, bool) {
        self.left -= 1;
        (self.posts[me].as_mut().and_then(|post| post.sends.take()), self.left == 0)
    }

    /// Member `me` gives up receiving. Returns the senders whose last bytes this lets go, and whether all members are
    /// done. What it sends can still be taken.
    pub fn cancel(&mut self, me: usize) -> (Vec<usize>, bool) {
        let mut freed = Vec::new();
        let expects = match &mut self.posts[me] {
            Some(post) if !post.cancelled => {
                post.cancelled = true;
                post.expects.clone()
            }
            _ => return (freed, false),
        };
        for (peer, &bytes) in expects.iter().enumerate() {
            // Who does not match may send nothing where something is expected.
            let sends = self.posts[peer].as_ref().is_some_and(|post| post.bytes[me] > 0);
            if bytes > 0 && sends && !self.was_taken(peer, me) && self.take(peer, me) {
                freed.push(peer);
            }
        }
        self.left -= 1;
        (freed, self.left == 0)
    }

    /// Who called what, if the posts do not match: the position to blame and the words for it.
    ///
    /// The blame goes to the member that disagrees with most others; among equals to the last one, so the verdict
    /// depends on no order of arrival.
    pub fn judge(&self) -> Option<(usize, String)> {
        let posts: Vec<(usize, &Post)> =
            self.posts.iter().enumerate().filter_map(|(i, post)| Some((i, post.as_ref()?))).collect();
        let mut worst: Option<(usize, usize, String)> = None;
        for &(me, post) in &posts {
            let mut count = 0;
            let mut words = None;
            for &(peer, other) in &posts {
                if let Some(text) = post.disagrees(other, me, peer) {
                    count += 1;
                    words.get_or_insert_with(|| self.explain(me, peer, &text));
                }
            }
            if let Some(words) = words
                && worst.as_ref().is_none_or(|(most, ..)| count >= *most)
            {
                worst = Some((count, me, words));
            }
        }
        worst.map(|(_, me, words)| (me, words))
    }

    fn explain(&self, me: usize, peer: usize, text: &str) -> String {
        let call = |i: usize| match &self.posts[i] {
            Some(post) => format!("rank {} called {} of {}", self.members[i], post.site, post.element),
            None => format!("rank {} called nothing", self.members[i]),
        };
        if me == peer {
            return format!("{}, where {text}", call(me));
        }
        format!("{}, {}: {text}", call(me), call(peer))
    }

    fn was_taken(&self, from: usize, to: usize) -> bool {
        self.taken[from * self.members.len() + to]
    }
}

impl Post {
    /// A call's side, and what the transport keeps to itself, the landing.
    pub fn new(call: Call) -> (Self, Landing) {
        let bytes: Vec<u64> =
            call.sends.iter().map(|list| list.iter().map(|piece| piece.len() as u64).sum()).collect();
        let expects = call.landing.expected();
        let nonzero = |list: &[u64]| list.iter().filter(|&&bytes| bytes > 0).count();
        let post = Self {
            site: call.site,
            element: call.element,
            receives_left: nonzero(&expects),
            sends_left: nonzero(&bytes),
            sends: Some(Arc::new(call.sends)),
            bytes,
            expects,
            at_once: matches!(call.landing, Landing::Combine { .. }),
            synchronise: call.synchronise,
            cancelled: false,
        };
        (post, call.landing)
    }

    /// Why this post of position `me` does not match the post `other` of position `peer`.
    fn disagrees(&self, other: &Post, me: usize, peer: usize) -> Option<String> {
        if self.site.kind != other.site.kind {
            return Some("different calls".into());
        }
        if self.element != other.element {
            return Some("different element types".into());
        }
        if self.bytes[peer] != other.expects[me] {
            let (sent, expected) = (self.bytes[peer], other.expects[me]);
            return Some(format!("the first sends {sent} bytes to the second, which expects {expected}"));
        }
        if other.bytes[me] != self.expects[peer] {
            let (sent, expected) = (other.bytes[me], self.expects[peer]);
            return Some(format!("the second sends {sent} bytes to the first, which expects {expected}"));
        }
        None
    }
}
