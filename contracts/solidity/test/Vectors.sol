// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {LoggedVerdict, Neighbour} from "../src/Evidence.sol";
import {
    Bid,
    BidReceipt,
    BookSeal,
    ClearingCertificate,
    Receipt,
    Rung
} from "../src/MarketRecords.sol";

/// @title Records, digests and trees as the Python side makes them.
/// @dev Written by tests/court_vectors.py; a test holds the two equal.
library Vectors {
    uint256 internal constant CHAIN_ID = 31337;
    address internal constant ESCROW = address(bytes20(hex"5555555555555555555555555555555555555555"));
    address internal constant SIGNER = address(bytes20(hex"d41c057fd1c78805aac12b0a94a405c0461a6fbb"));
    bytes32 internal constant JOB_ID = 0xabababababababababababababababababababababababababababababababab;

    function receipt() internal pure returns (Receipt memory record, bytes32 digest, bytes memory signature) {
        record = Receipt("lease_0123456789", 2, 0xabababababababababababababababababababababababababababababababab, 0x9999999999999999999999999999999999999999999999999999999999999999, address(bytes20(hex"6813eb9362372eef6200f3b1dbc3f819671cba69")), "12D3KooWdddddddddddddddddddddddddddddddddddddddd");
        digest = 0xa51feb67ba77fe8835c01cfe1c24cea91ca9ebd7fc771cb923baad30624a93f5;
        signature = hex"94bfdcb572195652bd3d2f004de2714b241e29a8ad4e9acce725022cafe154f83e3ea1c634f49fa7bd9afe4343dda0899a7c8ff02ee5061253bd22c7e564d5621b";
    }

    function bid() internal pure returns (Bid memory record, bytes32 digest, bytes memory signature) {
        record = Bid(0xabababababababababababababababababababababababababababababababab, "rollout", 5, 9, 9007199254740990, 8, address(bytes20(hex"6813eb9362372eef6200f3b1dbc3f819671cba69")), "12D3KooWdddddddddddddddddddddddddddddddddddddddd", 1700000060000, 9007199254740991);
        digest = 0xbca9fdead6a0f8cd64b3f8e525c4f15666a120a3769ca82398a4c9334a6f7279;
        signature = hex"93664706ed0ec9b50f2749b218ff6b7db70eafbda4861f48e0a894f9a08845696c9a1e7031f219627df1b6cf0518c30cd62a2e064c3b9f47b30a731ed48b70191b";
    }

    function bidReceipt() internal pure returns (BidReceipt memory record, bytes32 digest, bytes memory signature) {
        record = BidReceipt(0xa593688ab8d413aaf689cfe379e21f7a53bbf9cb752a53cf0a4e9a9311f5f3a8, 5, 9, 1700000000000, 9007199254740991);
        digest = 0xcbda3c66f0bdde14b4eab4aa633469fc25da3db3a11b39de166851f6e6aa38b4;
        signature = hex"f500c8c9f02612f629b7e4e11bc0a0e9f856f1ba8db076212e76bfc20f2341f0398578ffe3b9a398ef86d467a1546f386bbfef4eb79d8137c5c0f45c1883aac51b";
    }

    function seal() internal pure returns (BookSeal memory record, bytes32 digest, bytes memory signature) {
        record = BookSeal(7, 0xb1396eaa746205c71d5436a4024ae94ffa07814a4e8d8fd532127ed08a280d4b, 11, 1700000000000);
        digest = 0x5b20a5c3533882ea8d09c575577e366d1012b346cacdf3d3e5e9cbfb79eddd3c;
        signature = hex"a81bb605ee9431d8e5f6d3fd2e4773ceb09abcf51858444b96a8fcb30df87da072275929496c55d9ecc1895c99a71d924fd7f6a0bb7c3b7e22172ded10957d391c";
    }

    function certificate() internal pure returns (ClearingCertificate memory record, bytes32 digest, bytes memory signature) {
        record = ClearingCertificate(0x0e4952de7c57d24ca65f08ce1c186be32ad29c97ff2e905b6aad73ce839f99df, 0x77a090aad212aa9ae58007972aeee6d79b3e11140c686be5451c37df5d325dd2, 0xabababababababababababababababababababababababababababababababab, 7, 0xb1396eaa746205c71d5436a4024ae94ffa07814a4e8d8fd532127ed08a280d4b, 0x3333333333333333333333333333333333333333333333333333333333333333, 0x4444444444444444444444444444444444444444444444444444444444444444, 0x584fe1129f90864b0a39e305a1d63025c216e27aa0d0307ba45f81efab678ad6, 16, 200, 180, 2);
        digest = 0xec99eacffd9115f34df0719b7463320c63e32ba7b6ba444f755723e4d167a502;
        signature = hex"9f2a354d298b263c046010b0b6dd979d500861809f2bf27db8e17f7005b3f5fe3b166ea5fdc328ae88c6aa6fce03ef6dd69410895f5da00b03580dcf74395c2a1c";
    }

    function sealedBid() internal pure returns (bytes32 salt, bytes32 commitment) {
        salt = 0x000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f;
        commitment = 0xa593688ab8d413aaf689cfe379e21f7a53bbf9cb752a53cf0a4e9a9311f5f3a8;
    }

    function gap() internal pure returns (Neighbour[] memory neighbours, bytes32 root) {
        root = 0xb1396eaa746205c71d5436a4024ae94ffa07814a4e8d8fd532127ed08a280d4b;
        neighbours = new Neighbour[](2);
        (neighbours[0].index, neighbours[0].count, neighbours[0].commitment) = (2, 11, 0x69c322e3248a5dfc29d73c5b0553b0185a35cd5bb6386747517ef7e53b15e287);
        neighbours[0].proof = new bytes32[](4);
        neighbours[0].proof[0] = 0x15d36f316c5a0744a039a6a271ef26f06bccbcd45b950e2d83fb276dbe2758e9;
        neighbours[0].proof[1] = 0x563605df8b24342abca41518656648df0931a23880dcdd03ae10570de0211959;
        neighbours[0].proof[2] = 0x910c37fadec283a474300d76c37dd4637ad9d310c7a85a19bdd9fa8d76ab70f3;
        neighbours[0].proof[3] = 0x636ed8945ef01303264cf30e4b102f63d1a77e850b39713733db4d3812a91d99;
        (neighbours[1].index, neighbours[1].count, neighbours[1].commitment) = (3, 11, 0xb2e7b7a21d986ae84d62a7de4a916f006c4e42a596358b93bad65492d174c4ff);
        neighbours[1].proof = new bytes32[](4);
        neighbours[1].proof[0] = 0x1e1176c53a8ef3420d36e19c1653ad2b875ac6fcc3a02d1c8e7db3da393299da;
        neighbours[1].proof[1] = 0x563605df8b24342abca41518656648df0931a23880dcdd03ae10570de0211959;
        neighbours[1].proof[2] = 0x910c37fadec283a474300d76c37dd4637ad9d310c7a85a19bdd9fa8d76ab70f3;
        neighbours[1].proof[3] = 0x636ed8945ef01303264cf30e4b102f63d1a77e850b39713733db4d3812a91d99;
    }

    function rungOnLadder() internal pure returns (Rung memory rung, bytes32[] memory proof, bytes32 root) {
        rung = Rung(2, 5, 0x114a3fe82a0219fcc31abd15617966a125f12b0fd3409105fc83b487a9d82de4, address(bytes20(hex"6813eb9362372eef6200f3b1dbc3f819671cba69")), 102, 7, 9007199254740989, 3);
        root = 0x584fe1129f90864b0a39e305a1d63025c216e27aa0d0307ba45f81efab678ad6;
        proof = new bytes32[](3);
        proof[0] = 0x388b974fce684e064fd374072633d11395e0a47f37dbcd9ee796bb4c9d7597e7;
        proof[1] = 0x324fb4329a6c8af9b5ec519c654dfcc1f8808e6ba279943a9063e3efd373a778;
        proof[2] = 0x6a7c62e0e791189f5a0f86ba001b40e9331bd24d5d2ff743887ca1b8dc8fe886;
    }

    function loggedVerdict() internal pure returns (LoggedVerdict memory verdict, bytes32 task, bytes32 head) {
        verdict.epoch = 1;
        verdict.seq = 1;
        verdict.payload = hex"7b225f74797065223a2268747470733a2f2f696e2d746f746f2e696f2f53746174656d656e742f7631222c22707265646963617465223a7b226163636f756e74223a22307837453546343535323039314136393132356435446643623762384332363539303239333935426466222c226b696e64223a22726f6c6c6f7574222c226e6f6465223a22313244334b6f6f5762626262626262626262626262626262626262626262626262626262626262626262626262626262222c227461736b5f6964223a227461736b5f30313233343536373839222c2276657264696374223a7b226163636570746564223a747275652c2261756469746564223a66616c73652c22636865636b73223a5b7b2264657461696c223a225c227461736b5f69645c223a5c22785c222c5c227061795f6d6963726f735c223a39222c226e616d65223a22666f726d222c22706173736564223a747275657d5d2c226a6f625f6964223a22307861626162616261626162616261626162616261626162616261626162616261626162616261626162616261626162616261626162616261626162616261626162222c226c656173655f65706f6368223a322c226c656173655f6964223a226c656173655f30313233343536373839222c226e756d5f756e697473223a342c227061795f6d6963726f73223a3435302c22726573756c745f736861323536223a2239393939393939393939393939393939393939393939393939393939393939393939393939393939393939393939393939393939393939393939393939393939227d2c22776f726b5f736861323536223a2261616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161227d2c2270726564696361746554797065223a2268747470733a2f2f73686f616c2e6465762f70726f76656e616e63652f766572696669636174696f6e2f7631222c227375626a656374223a5b7b22646967657374223a7b22736861323536223a2239393939393939393939393939393939393939393939393939393939393939393939393939393939393939393939393939393939393939393939393939393939227d2c226e616d65223a22726573756c74227d5d7d";
        verdict.taskAt = 186;
        verdict.payAt = 482;
        verdict.proof = new bytes32[](1);
        verdict.proof[0] = 0x95409e753360ce9fcda11b9121ace2251711bd370a315fca4ca2d8a1c2cd2235;
        verdict.anchor.root = 0xb1f7f4a633904aef59456c95d2dadeaa7feea1bccd2fea0f2b33641e8d670fcb;
        verdict.anchor.leaves = 2;
        verdict.anchor.laterRoots = new bytes32[](1);
        verdict.anchor.laterRoots[0] = 0x5a28a897fefbcd726f4a7a9e8e400ea77905047b239d44cc44ecefffce2f0b45;
        verdict.anchor.laterLeaves = new uint64[](1);
        verdict.anchor.laterLeaves[0] = 1;
        task = 0xd5433af09d6e03fe039450e57ea788270642440d76eef3b1c6f8b92d49c478e5;
        head = 0x22155f1b18a30e564d4c25c7af33a645ef14af290dfd697cc1830ed29e2a9292;
    }
}
