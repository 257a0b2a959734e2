/* The packet protocol of one-shot all-reduce (csrc/cuda/packets.cuh), for spin.
 *
 * Every rank has a buffer [parity][source][packet] that its peers write. A packet carries its
 * operation's epoch, and nothing else is published: the receiver polls the packet. Operation by
 * operation the parity changes; nobody gives a buffer back. Why that is enough: a rank that writes
 * with a parity again is through with the operation between, in which it heard from every peer; and
 * a peer's kernel starts only when its kernel before has ended.
 *
 * Packet 0 is the greeting, with the operation's tag, sent and heard by a warp of CTA 0. Where tags
 * differ, every rank has a peer of another tag: it sets its own abort word and leaves, and so does
 * who waits and sees the word. An operation that was left keeps no epoch, and no operation runs
 * after it. What may not be: that an operation takes another's data for its own and does not leave.
 *
 * Each operation has one of the shapes below, chosen at will: where a CTA's packets lie, and how
 * many CTAs there are, changes from call to call. Block c counts up the epoch of CTA c, block 0 also
 * those of the CTAs that the operation has not. A block is one process, but for the greeting, which
 * is one of its own: warps do not meet before the end.
 *
 * DISAGREE: rank 0 has, as one of its operations, one that the others have not. ABORTS: the host of
 * each rank sets its abort word at any time.
 *
 * That the 16 bytes of a packet arrive together is an assumption here; the lint of the PTX sees to
 * it that they are one access.
 */

#ifndef RANKS
#define RANKS 2
#endif
#ifndef OPERATIONS
#define OPERATIONS 4
#endif
#ifndef DISAGREE
#define DISAGREE 0
#endif
#ifndef ABORTS
#define ABORTS 0
#endif
#define CTAS 2    /* the most that an operation has */
#define PLACES 3  /* the greeting, and the packets of the largest operation */
#define PARITIES 2
#define GREETING 0

/* One CTA with one packet; one with two; two with one each; two, and the second has no part. */
#ifndef SHAPES
#define SHAPES 4
#endif
#define CTAS_OF(shape) (shape < 2 -> 1 : 2)
#define FIRST(shape, cta) (1 + cta)
#define PACKETS(shape, cta) (shape == 1 -> 2 : (shape == 3 && cta == 1 -> 0 : 1))

typedef Packet {
  byte epoch;
  byte tag; /* what a greeting tells; in other packets a ghost that says who wrote the data */
};

#define AT(owner, epoch, source, place) \
  ((((owner) * PARITIES + (epoch) % PARITIES) * RANKS + (source)) * PLACES + (place))
Packet buffer[RANKS * PARITIES * RANKS * PLACES];

byte packet_epoch[RANKS * CTAS]; /* each rank's own */
#define EPOCH(cta) packet_epoch[rank * CTAS + (cta)]

bool abort_word[RANKS];
byte ended[RANKS];   /* blocks of the rank that are through */
byte greeted[RANKS]; /* greetings of the rank that are over */
bool left[RANKS];    /* an operation of the rank was left */
bool wrong[RANKS];   /* an operation of the rank took the data of another */

byte shape[OPERATIONS];   /* of all ranks, but for rank 0's odd operation */
byte odd = OPERATIONS;    /* its number, if there is one */
byte odd_shape;
#define ODD (rank == 0 && operation == odd)
#define SHAPE (ODD -> odd_shape : shape[operation])
#define TAG (ODD -> OPERATIONS : operation)

/* The kernel before has ended; an operation after one that was left does not start. */
#define START \
  (ended[rank] >= operation * CTAS); \
  if \
  :: abort_word[rank] -> left[rank] = true; goto leave \
  :: !abort_word[rank] \
  fi

/* One packet to every peer. */
inline push() {
  for (peer : 0 .. RANKS - 1) {
    if
    :: peer != rank ->
      buffer[AT(peer, epoch, rank, place)].epoch = epoch;
      buffer[AT(peer, epoch, rank, place)].tag = TAG
    :: else
    fi
  }
  peer = 0
}

#define FROM_PEER buffer[AT(rank, epoch, peer, place)]

/* One packet from every peer. */
inline poll() {
  do
  :: peer == RANKS -> break
  :: peer == rank -> peer++
  :: peer < RANKS && peer != rank ->
    if
    :: FROM_PEER.epoch == epoch ->
      if
      :: FROM_PEER.tag == TAG
      :: FROM_PEER.tag != TAG -> assert(odd < OPERATIONS); wrong[rank] = true
      fi
    :: abort_word[rank] -> left[rank] = true; peer = 0; goto leave
    fi;
    peer++
  od;
  peer = 0
}

/* The greeting of every peer. */
inline hear() {
  do
  :: peer == RANKS -> break
  :: peer == rank -> peer++
  :: peer < RANKS && peer != rank ->
    if
    :: FROM_PEER.epoch == epoch ->
      if
      :: FROM_PEER.tag == TAG
      :: FROM_PEER.tag != TAG -> abort_word[rank] = true; left[rank] = true; goto leave
      fi
    :: abort_word[rank] -> left[rank] = true; goto leave
    fi;
    peer++
  od
}

/* What an atomic sequence joins concerns this process alone, but for its first action and for
 * packets that are pushed as soon as the operation starts: both may come as late as they like, since
 * what the start waits for stays so.
 */
proctype greeting(byte rank) {
  byte operation, peer, place, epoch;
start:
  atomic {
    START;
    epoch = EPOCH(0) + 1;
    place = GREETING;
    push()
  }
  atomic {
    hear();
leave:
    greeted[rank]++;
    operation++;
    peer = 0;
    epoch = 0;
    if
    :: operation < OPERATIONS -> goto start
    :: else
    fi
  }
}

proctype cta_block(byte rank; byte cta) {
  byte operation, peer, place, epoch, last;
start:
  atomic {
    (ended[rank] >= operation * CTAS);
    if
    :: cta >= CTAS_OF(SHAPE) -> goto over
    :: else
    fi;
    START;
    epoch = EPOCH(cta) + 1;
    place = FIRST(SHAPE, cta);
    last = place + PACKETS(SHAPE, cta);
    if
    :: place == last -> goto leave
    :: else -> push()
    fi
  }
packet:
  atomic {
    poll();
    place++;
    if
    :: place < last -> goto next
    :: else
    fi;
leave: /* warps meet */
    (cta != 0 || greeted[rank] > operation);
    if
    :: abort_word[rank] -> goto over /* no epoch is kept */
    :: else
    fi;
    EPOCH(cta) = epoch;
    if
    :: cta == 0 && CTAS_OF(SHAPE) == 1 -> EPOCH(1) = EPOCH(1) + 1
    :: else
    fi;
over:
    ended[rank]++;
    assert(ended[rank] < (operation + 1) * CTAS || !wrong[rank] || (left[rank] && abort_word[rank]));
    operation++;
    place = 0;
    epoch = 0;
    last = 0;
    if
    :: operation < OPERATIONS -> goto start
    :: else -> goto all_over
    fi
  }
next:
  atomic { push(); goto packet }
all_over:
  skip
}

proctype host(byte rank) { abort_word[rank] = true }

init {
  byte i, one;
  atomic {
    for (i : 0 .. OPERATIONS - 1) {
      select(one : 0 .. SHAPES - 1);
      shape[i] = one;
    }
    if
    :: DISAGREE ->
      select(one : 0 .. OPERATIONS - 1);
      odd = one;
      select(one : 0 .. SHAPES - 1);
      odd_shape = one
    :: !DISAGREE
    fi;
    for (i : 0 .. RANKS - 1) {
      run greeting(i);
      run cta_block(i, 0);
      run cta_block(i, 1);
      if
      :: ABORTS -> run host(i)
      :: !ABORTS
      fi
    }
    i = 0;
    one = 0
  }
}
