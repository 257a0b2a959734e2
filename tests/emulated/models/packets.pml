/* The packet protocol of one-shot all-reduce (csrc/cuda/kernel_args.h), for spin.
 *
 * Every rank has a buffer [parity][source][packet] that its peers write. A packet carries its
 * operation's epoch, and nothing else is published: the receiver polls the packet. Operation by
 * operation the parity changes; nobody gives a buffer back. Why that is enough: a rank that writes
 * with a parity again is through with the operation between, in which it heard from every peer; and
 * a peer's kernel starts only when its kernel before has ended.
 *
 * Each operation has one of the shapes below, chosen at will: where a CTA's packets lie, and how
 * many CTAs there are, changes from call to call. Block c counts up the epoch of CTA c, block 0 also
 * those of the CTAs that the operation has not.
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
#define CTAS 2    /* the most that an operation has */
#define PLACES 2  /* packets of the largest operation */
#define PARITIES 2

/* One CTA with one packet; one with two; two with one each; two, and the second has no part. */
#define SHAPES 4
#define CTAS_OF(shape) (shape < 2 -> 1 : 2)
#define FIRST(shape, cta) (cta)
#define PACKETS(shape, cta) (shape == 1 -> 2 : (shape == 3 && cta == 1 -> 0 : 1))

typedef Packet {
  byte epoch;
  byte operation; /* the data: a ghost that says which operation wrote it */
};

#define AT(owner, epoch, source, place) \
  ((((owner) * PARITIES + (epoch) % PARITIES) * RANKS + (source)) * PLACES + (place))
Packet buffer[RANKS * PARITIES * RANKS * PLACES];

byte packet_epoch[RANKS * CTAS]; /* each rank's own */
#define EPOCH(cta) packet_epoch[rank * CTAS + (cta)]

byte ended[RANKS];      /* blocks of the rank that are through */
byte shape[OPERATIONS]; /* alike on all ranks */

/* One packet to every peer, and one from every peer. */
inline push() {
  for (peer : 0 .. RANKS - 1) {
    if
    :: peer != rank ->
      buffer[AT(peer, epoch, rank, place)].epoch = epoch;
      buffer[AT(peer, epoch, rank, place)].operation = operation
    :: else
    fi
  }
  peer = 0
}
inline poll() {
  do
  :: peer == RANKS -> break
  :: peer == rank -> peer++
  :: peer < RANKS && peer != rank ->
    buffer[AT(rank, epoch, peer, place)].epoch == epoch;
    assert(buffer[AT(rank, epoch, peer, place)].operation == operation);
    peer++
  od;
  peer = 0
}

/* What an atomic sequence joins concerns this block alone, but for its first action. */
proctype cta_block(byte rank; byte cta) {
  byte operation, peer, place, epoch, last;
start:
  atomic {
    ended[rank] >= operation * CTAS; /* the kernel before has ended */
    if
    :: cta >= CTAS_OF(shape[operation]) -> goto over
    :: else
    fi;
    epoch = EPOCH(cta) + 1;
    place = FIRST(shape[operation], cta);
    last = place + PACKETS(shape[operation], cta)
  }
packet:
  if
  :: place < last ->
    d_step { push() }
    atomic { poll(); place++; goto packet }
  :: else
  fi;
  atomic {
    EPOCH(cta) = epoch;
    if
    :: cta == 0 && CTAS_OF(shape[operation]) == 1 -> EPOCH(1) = EPOCH(1) + 1
    :: else
    fi;
over:
    ended[rank]++;
    operation++;
    place = 0;
    epoch = 0;
    last = 0;
    if
    :: operation < OPERATIONS -> goto start
    :: else
    fi
  }
}

init {
  byte i, one;
  atomic {
    for (i : 0 .. OPERATIONS - 1) {
      select(one : 0 .. SHAPES - 1);
      shape[i] = one;
    }
    for (i : 0 .. RANKS - 1) {
      run cta_block(i, 0);
      run cta_block(i, 1);
    }
    i = 0;
    one = 0;
  }
}
